"""A gallery of enrolled hands: a folder that grows, a search that is exact and bounded in memory, and a log of who did what.

Files are numbered and never change; one index is renamed last, so that a search beside an enrollment sees the state before or
after it. Removing a person writes the others anew and deletes the file that held the person's vectors. The log only grows.
"""

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handmstn.recognizer import BLOCK, Array, gated, part_scores, score_block
from handmstn.records import Strings
from tenfold import UserError, checkpoints
from tenfold.errors import did_you_mean, needs
from tenfold.growing import Entry, Growing

KIND = "handmstn.gallery"
LOG = "log.jsonl"
MILLION = 1_000_000
PER_FILE = 50_000
_TRIES = 5


@dataclasses.dataclass(frozen=True)
class Enrolled:
    """Hands as vectors, (N,) each.

    Attributes:
        parts: unit descriptors, (N, P, D).
        visibility: share of each part that is seen, (N, P).
        persons: ids.
        sides: left, right or unknown.
        names: pictures that they come from.
        digests: fingerprints of those pictures' pixels.
        guessed: what was guessed of each, in words.
    """

    parts: Array
    visibility: Array
    persons: Strings
    sides: Strings
    names: Strings
    digests: Strings
    guessed: Strings

    def __len__(self) -> int:
        return len(self.persons)

    def part(self, chosen: NDArray[Any]) -> "Enrolled":
        """Some of them."""
        return Enrolled(**{f.name: getattr(self, f.name)[chosen] for f in dataclasses.fields(self)})

    @property
    def classes(self) -> Strings:
        """``person`` or, with a known side, ``person:side``."""
        both = [p if s == "unknown" else f"{p}:{s}" for p, s in zip(self.persons, self.sides, strict=True)]
        return np.asarray(both, dtype=np.str_)


def joined(several: Sequence[Enrolled]) -> Enrolled:
    """Several sets as one."""
    names = [f.name for f in dataclasses.fields(Enrolled)]
    return Enrolled(**{name: np.concatenate([getattr(one, name) for one in several]) for name in names})


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of an answer.

    Attributes:
        person: id.
        side: side of the enrolled hand.
        score: of the best picture of that hand.
        name: that picture.
        parts: score of each part, NaN where either side hides it.
        common: weighted share of the parts that both show.
        row: number of the picture in the gallery.
        guessed: what was guessed of it.
    """

    person: str
    side: str
    score: float
    name: str
    parts: tuple[float, ...]
    common: float
    row: int
    guessed: str


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Gallery:
    """Enrolled hands of one model; made by ``Gallery.create`` or ``Gallery.open``.

    Attributes:
        path: its folder; None for one in memory.
        head: what holds for all: digest and version of the model, preset, names of the parts, size of a descriptor, weights.
        enrolled: the hands.
    """

    def __init__(self, head: Mapping[str, Any], enrolled: Enrolled | None = None, path: Path | None = None) -> None:
        self.head = dict(head)
        self.path = path
        count = len(self.head["parts"])
        none = np.zeros(0, dtype=np.str_)
        empty = Enrolled(
            np.zeros((0, count, self.head["dim"]), np.float32),
            np.zeros((0, count), np.float32),
            none,
            none,
            none,
            none,
            none,
        )
        self.enrolled = empty if enrolled is None else enrolled

    @property
    def weights(self) -> Array:
        """Weight of each part, (P,)."""
        return np.asarray(self.head["weights"], np.float32)

    def __len__(self) -> int:
        return len(self.enrolled)

    @classmethod
    def open(cls, path: str | os.PathLike[str], head: Mapping[str, Any] | None = None) -> "Gallery":
        """Load a gallery.

        Args:
            path: its folder.
            head: of the model that will search; another one is refused.

        Raises:
            UserError: no gallery there, one of another model or preset, or a broken file.
        """
        path = Path(path).expanduser()
        for attempt in range(_TRIES):
            growing = Growing.open(path, kind=KIND, option="--gallery")
            try:
                parts = [_read(entry) for entry in growing.entries]
                break
            except UserError:
                if attempt == _TRIES - 1:  # else a removal has replaced a file since the index was read
                    raise
        found = cls(growing.head, joined(parts) if parts else None, path)
        if head is not None:
            found.check(head)
        return found

    def check(self, head: Mapping[str, Any]) -> None:
        """Check that a model is the one that the gallery was enrolled with.

        Raises:
            UserError: another preset, other parts or another model; the message says which.
        """
        for key, what in (
            ("preset", "preset"),
            ("parts", "parts"),
            ("dim", "size of a descriptor"),
            ("model", "model"),
        ):
            if self.head.get(key) != head.get(key):
                hint = f" (of handmstn {self.head.get('version')})" if key == "model" else ""
                raise UserError(
                    f"--gallery {self.path}: enrolled with the {what} {self.head.get(key)!r}{hint}, this one has"
                    f" {head.get(key)!r}; vectors of different models do not compare: enroll the pictures again"
                )

    def enroll(self, hands: Enrolled, *, purpose: str = "", image_source: str = "") -> int:
        """Add hands, and log who and why; pictures whose pixels are enrolled for the same person already are passed over.

        Args:
            hands: the hands.
            purpose: why, in words; needed for a gallery on disk.
            image_source: where the pictures come from, for the log.

        Returns:
            The number of hands that were added.

        Raises:
            UserError: no purpose, another size of descriptor, NaN, or another command is writing.
        """
        shape = hands.parts.shape[1:]
        if shape != (len(self.head["parts"]), self.head["dim"]):
            raise UserError(
                f"descriptors {shape} do not fit a gallery of {len(self.head['parts'])} x {self.head['dim']}"
            )
        if not np.isfinite(hands.parts).all():
            raise UserError(
                f"the descriptor of {hands.names[int(np.argwhere(~np.isfinite(hands.parts))[0, 0])]} is not finite"
            )
        if self.path is None:
            self.enrolled = joined([self.enrolled, self._new(hands, self.enrolled)])
            return len(self.enrolled)
        if not purpose.strip():
            raise UserError("--purpose: expected a reason in words: it is kept in the gallery's log")
        with Growing.open(self.path, kind=KIND, writing=True, head=self.head, option="--gallery") as growing:
            self._repair_log(growing)
            there = [_read(entry) for entry in growing.entries]
            new = self._new(hands, joined(there) if there else None)
            for start in range(0, len(new), PER_FILE):
                block = new.part(np.arange(start, min(start + PER_FILE, len(new))))
                persons = sorted(set(block.persons.tolist()))
                about = {"count": len(block), "when": now(), "purpose": purpose, "source": image_source}
                with growing.adding(".safetensors", about) as temporary:
                    _write(temporary, block)
                file = growing.entries[-1].path.name
                self._log("enroll", purpose, persons=persons, count=len(block), file=file, source=image_source)
            parts = [*there, new] if len(new) else there
            self.enrolled = joined(parts) if parts else self.enrolled
        return len(new)

    def _new(self, hands: Enrolled, there: Enrolled | None) -> Enrolled:
        known = set() if there is None else set(zip(there.persons.tolist(), there.digests.tolist(), strict=True))
        fresh = []
        for row, key in enumerate(zip(hands.persons.tolist(), hands.digests.tolist(), strict=True)):
            if not key[1] or key not in known:
                fresh.append(row)
            known.add(key)
        return hands.part(np.asarray(fresh, np.int64))

    def remove(self, person: str, *, purpose: str) -> int:
        """Delete the vectors of a person; what is left is written anew and the old files are deleted.

        Returns:
            The number of pictures that were removed.

        Raises:
            UserError: nobody of this id, no purpose, or another command is writing.
        """
        if person not in self.enrolled.persons:
            near = did_you_mean(person, set(self.enrolled.persons.tolist()))
            raise UserError(f"--person '{person}': nobody of this id is in the gallery: {near}")
        if self.path is None:
            gone = self.enrolled.persons == person
            self.enrolled = self.enrolled.part(~gone)
            return int(gone.sum())
        if not purpose.strip():
            raise UserError("--purpose: expected a reason in words: it is kept in the gallery's log")
        count = 0
        with Growing.open(self.path, kind=KIND, writing=True, option="--gallery") as growing:
            self._repair_log(growing)
            for entry in list(growing.entries):
                held = _read(entry)
                gone = held.persons == person
                if not gone.any():
                    continue
                count += int(gone.sum())
                rest = held.part(~gone)
                if len(rest):
                    with growing.replaced(entry, ".safetensors", {**entry.about, "count": len(rest)}) as temporary:
                        _write(temporary, rest)
                else:
                    growing.drop(entry)
            self._log("remove", purpose, persons=[person], count=count)
            left = [_read(entry) for entry in growing.entries]
        self.enrolled = joined(left) if left else Gallery(self.head).enrolled
        return count

    def merge(self, other: "Gallery", *, purpose: str = "") -> int:
        """Add the hands of another gallery of the same model.

        Returns:
            The number of hands that were added; those that are in both are kept once.

        Raises:
            UserError: it is of another model.
        """
        self.check(other.head)
        return self.enroll(other.enrolled, purpose=purpose, image_source=str(other.path or ""))

    # The log

    def _log(self, what: str, purpose: str, **more: Any) -> None:
        if self.path is not None:
            line = json.dumps({"when": now(), "what": what, "purpose": purpose, **more}, ensure_ascii=False)
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _repair_log(self, growing: Growing) -> None:
        """Log enrollments that a kill has kept from the log: the index knows when and why."""
        logged = {line.get("file") for line in self.log()}
        for entry in growing.entries:
            if entry.path.name not in logged and "purpose" in entry.about and not self._replaced(entry):
                persons = sorted(set(_read(entry).persons.tolist()))
                more = {
                    "persons": persons,
                    "count": entry.about.get("count", len(persons)),
                    "file": entry.path.name,
                    "enrolled": entry.about["when"],
                }
                self._log("enroll", str(entry.about["purpose"]), **more)

    def _replaced(self, entry: Entry) -> bool:
        """Whether a file is the rest that a removal has left, whose people are in the log already."""
        return any(line["what"] == "remove" and line["when"] >= entry.about.get("when", "") for line in self.log())

    def log_search(self, names: Sequence[str], answers: Sequence[str], purpose: str = "") -> None:
        """Note who was searched for, and what was answered."""
        self._log("search", purpose, pictures=list(names), answers=list(answers), count=len(names))

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log, oldest first."""
        if self.path is None or not (self.path / LOG).exists():
            return []
        lines = (self.path / LOG).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    # Searching

    def search(
        self,
        parts: Array,
        visibility: Array,
        top: int = 5,
        *,
        sides: Strings | None = None,
        digests: Strings | None = None,
        visible: bool = True,
        index: str = "exact",
        shortlist: int = 200,
    ) -> list[list[Candidate]]:
        """The best hands for each probe, best first; each hand by its best picture.

        Args:
            parts: descriptors of the probes, (Q, P, D).
            visibility: (Q, P).
            top: number of candidates.
            sides: sides of the probes; a left hand is not compared with a right one of known side.
            digests: fingerprints of the probes; a picture does not find itself. None lets it.
            visible: whether covered parts are left out; False compares the fused embeddings of all parts.
            index: exact, faiss-flat or faiss-hnsw; faiss finds a shortlist by the fused embedding, which is then scored.
            shortlist: length of that list, in pictures.

        Raises:
            UserError: the gallery is empty, or faiss is not installed.
            ValueError: other descriptors than the gallery's.
        """
        if not len(self):
            raise UserError(f"--gallery {self.path or ''}: nobody is enrolled")
        if parts.shape[1:] != self.enrolled.parts.shape[1:]:
            raise ValueError(f"probes {parts.shape[1:]}, the gallery has {self.enrolled.parts.shape[1:]}")
        if index != "exact":
            return self._by_shortlist(parts, visibility, top, sides, digests, visible, index, shortlist)
        scores, rows = self._best(parts, visibility, top, sides, digests, visible)
        return [self._candidates(parts[q], visibility[q], rows[q], scores[q]) for q in range(len(parts))]

    def _candidates(self, parts: Array, visibility: Array, rows: NDArray[Any], scores: NDArray[Any]) -> list[Candidate]:
        found = []
        held, weights = self.enrolled, self.weights
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            if score == -math.inf:
                continue
            each = part_scores((parts[None], visibility[None]), (held.parts[row][None], held.visibility[row][None]))[0]
            common = float((weights * visibility * held.visibility[row]).sum())
            values = (str(held.persons[row]), str(held.sides[row]), float(score), str(held.names[row]))
            found.append(Candidate(*values, tuple(each.tolist()), common, int(row), str(held.guessed[row])))
        return found

    def _best(
        self,
        parts: Array,
        visibility: Array,
        top: int,
        sides: Strings | None,
        digests: Strings | None,
        visible: bool,
        chosen: NDArray[Any] | None = None,
    ) -> tuple[Array, NDArray[np.int64]]:
        """Scores and rows of the best picture of each of the ``top`` best hands, (Q, top); blocked over both sides."""
        held, weights = self.enrolled, self.weights
        classes = held.classes
        order = (
            np.argsort(classes, kind="stable") if chosen is None else chosen[np.argsort(classes[chosen], kind="stable")]
        )
        sorted_classes = classes[order]
        probes = gated(parts, visibility if visible else np.ones_like(visibility), weights)
        width = max(1, probes[0].shape[1])
        gallery_rows = max(1, min(len(order), BLOCK // (4 * width)))
        probe_rows = max(1, min(len(parts), BLOCK // (8 * gallery_rows)))
        best = np.full((len(parts), top), -np.inf, np.float32)
        where = np.zeros((len(parts), top), np.int64)
        start = 0
        while start < len(order):
            end = min(start + gallery_rows, len(order))
            while end < len(order) and sorted_classes[end] == sorted_classes[end - 1]:
                end += 1  # a hand's pictures stay together
            rows = order[start:end]
            seen = held.visibility[rows] if visible else np.ones_like(held.visibility[rows])
            block = gated(held.parts[rows], seen, weights)
            begins = np.flatnonzero(np.append(True, sorted_classes[start + 1 : end] != sorted_classes[start : end - 1]))
            for first in range(0, len(parts), probe_rows):
                last = min(first + probe_rows, len(parts))
                scores = score_block((probes[0][first:last], probes[1][first:last]), block)
                if digests is not None:
                    own = digests[first:last]
                    scores[(own[:, None] == held.digests[rows][None]) & (own != "")[:, None]] = -np.inf
                if sides is not None:
                    a, b = sides[first:last, None], held.sides[rows][None]
                    scores[(a != b) & (a != "unknown") & (b != "unknown")] = -np.inf
                by_class = np.maximum.reduceat(scores, begins, axis=1)
                keep = min(top, by_class.shape[1])
                pick = np.argpartition(-by_class, keep - 1, axis=1)[:, :keep]
                value = np.take_along_axis(by_class, pick, 1)
                row = self._rows_of(scores, begins, pick, rows)
                value = np.concatenate([best[first:last], value], 1)
                row = np.concatenate([where[first:last], row], 1)
                sort = np.argsort(-value, axis=1, kind="stable")[:, :top]
                best[first:last] = np.take_along_axis(value, sort, 1)
                where[first:last] = np.take_along_axis(row, sort, 1)
            start = end
        return best, where

    @staticmethod
    def _rows_of(scores: Array, begins: NDArray[Any], pick: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.int64]:
        """Row of the best picture of each picked hand."""
        ends = np.append(begins[1:], scores.shape[1])
        out = np.zeros(pick.shape, np.int64)
        for q in range(len(pick)):
            for k, number in enumerate(pick[q].tolist()):
                low, high = begins[number], ends[number]
                out[q, k] = rows[low + int(scores[q, low:high].argmax())]
        return out

    def fused(self, parts: Array, visibility: Array) -> Array:
        """Unit embeddings sqrt(w v) f, whose products faiss searches, (N, P D)."""
        share = np.sqrt(self.weights[None] * visibility)
        whole = (share[..., None] * parts).reshape(len(parts), -1)
        out: Array = (whole / np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        return out

    def _by_shortlist(
        self,
        parts: Array,
        visibility: Array,
        top: int,
        sides: Strings | None,
        digests: Strings | None,
        visible: bool,
        index: str,
        shortlist: int,
    ) -> list[list[Candidate]]:
        """The candidates of each probe's shortlist, which grows until it holds ``top`` hands: one may have many pictures."""
        searched = self._index(index, visible=visible)
        answers: list[list[Candidate]] = [[] for _ in parts]
        wanted, count = min(top, len(np.unique(self.enrolled.classes))), max(shortlist, 4 * top)
        waiting = list(range(len(parts)))
        while waiting:
            picked = np.asarray(waiting)
            listed = self._listed(searched, parts[picked], visibility[picked], count, visible=visible)
            for q, row in zip(waiting, listed, strict=True):
                own = None if sides is None else sides[q : q + 1]
                digest = None if digests is None else digests[q : q + 1]
                scores, rows = self._best(
                    parts[q : q + 1], visibility[q : q + 1], top, own, digest, visible, row[row >= 0]
                )
                answers[q] = self._candidates(parts[q], visibility[q], rows[0], scores[0])
            waiting = [q for q in waiting if len(answers[q]) < wanted] if count < len(self) else []
            count *= 4
        return answers

    def shortlist(
        self, parts: Array, visibility: Array, count: int, index: str = "faiss-flat", *, visible: bool = True
    ) -> NDArray[np.int64]:
        """Rows of the gallery that are nearest by the fused embedding, from an index of FAISS, (Q, count); -1 fills up.

        Raises:
            MissingExtraError: faiss is not installed.
            ValueError: there is no such index.
        """
        return self._listed(self._index(index, visible=visible), parts, visibility, count, visible=visible)

    def _index(self, index: str, *, visible: bool) -> Any:
        """An index of FAISS over the fused embeddings."""
        needs("faiss", "faiss", "handmstn", why=f"--index {index}")
        import faiss

        if index not in {"faiss-flat", "faiss-hnsw"}:
            raise ValueError(f"index is one of exact, faiss-flat, faiss-hnsw, got '{index}'")
        held = self.enrolled
        vectors = self.fused(held.parts, held.visibility if visible else np.ones_like(held.visibility))
        if index == "faiss-flat":
            made: Any = faiss.IndexFlatIP(vectors.shape[1])
        else:
            made = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        made.add(np.ascontiguousarray(vectors))
        return made

    def _listed(
        self, searched: Any, parts: Array, visibility: Array, count: int, *, visible: bool
    ) -> NDArray[np.int64]:
        """Rows that an index of FAISS finds, (Q, count)."""
        if hasattr(searched, "hnsw"):
            searched.hnsw.efSearch = max(64, count)
        probes = self.fused(parts, visibility if visible else np.ones_like(visibility))
        _, rows = searched.search(np.ascontiguousarray(probes), min(count, len(self)))
        out: NDArray[np.int64] = rows
        return out

    def recall(self, parts: Array, visibility: Array, index: str, *, top: int = 5, probes: int = 100) -> float:
        """Share of the exact search's candidates that an index of FAISS finds too, over the first probes."""
        a, b = parts[:probes], visibility[:probes]
        exact = self.search(a, b, top)
        found = self.search(a, b, top, index=index)
        hits = [
            len({c.row for c in x} & {c.row for c in y}) / max(1, len(x)) for x, y in zip(exact, found, strict=True)
        ]
        return float(np.mean(hits))

    def threshold(self, fpir: float = 0.01, *, most: int = 2000) -> tuple[float, int]:
        """The score that a share ``fpir`` of strangers reaches: each enrolled hand is searched for among the others' hands.

        Args:
            fpir: the share.
            most: number of hands that are tried, evenly spaced.

        Returns:
            The threshold, and the number of tries behind it. With n people enrolled, no rate below about 1 / n can be told.

        Raises:
            UserError: fewer than two people.
        """
        held = self.enrolled
        if len(set(held.persons.tolist())) < 2:
            raise UserError(f"--gallery {self.path or ''}: a threshold needs two people or more: give --threshold")
        chosen = np.unique(np.linspace(0, len(held) - 1, min(most, len(held))).astype(np.int64))
        tops = []
        for start in range(0, len(chosen), 64):
            rows = chosen[start : start + 64]
            scores = self.scores(held.parts[rows], held.visibility[rows])
            scores[held.persons[rows][:, None] == held.persons[None]] = -np.inf
            tops.append(scores.max(1))
        best = np.sort(np.concatenate(tops))
        allowed = math.floor(fpir * len(best))
        return float(np.nextafter(best[len(best) - 1 - allowed], np.float32(np.inf))), len(best)

    def scores(self, parts: Array, visibility: Array, *, visible: bool = True) -> Array:
        """Scores of probes against every picture, (Q, G); as much memory as that takes."""
        a = gated(parts, visibility if visible else np.ones_like(visibility), self.weights)
        seen = self.enrolled.visibility if visible else np.ones_like(self.enrolled.visibility)
        return score_block(a, gated(self.enrolled.parts, seen, self.weights))


def _write(path: Path, hands: Enrolled) -> None:
    words = {name: getattr(hands, name).tolist() for name in ("persons", "sides", "names", "digests", "guessed")}
    tensors = {"parts": torch.from_numpy(np.ascontiguousarray(hands.parts))}
    tensors["visibility"] = torch.from_numpy(np.ascontiguousarray(hands.visibility))
    checkpoints.save(path, tensors, method=KIND, config=words)


def _read(entry: Entry) -> Enrolled:
    found = checkpoints.load(entry.path, method=KIND)
    try:
        words = {
            n: np.asarray(found.config[n], dtype=np.str_) for n in ("persons", "sides", "names", "digests", "guessed")
        }
        parts, visibility = found.tensors["parts"].numpy(), found.tensors["visibility"].numpy()
    except KeyError as error:
        raise UserError(f"{entry.path}: not a file of a gallery (no {error})") from error
    if any(len(value) != len(parts) for value in words.values()):
        raise UserError(f"{entry.path}: {len(parts)} vectors, but other numbers of names")
    return Enrolled(parts, visibility, **words)
