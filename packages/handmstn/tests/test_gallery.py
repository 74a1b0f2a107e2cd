"""The gallery: growing, exact search, removal, interruption, other models."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from handmstn import Gallery, match
from handmstn.gallery import LOG, Enrolled, joined

from tenfold import UserError

HEAD = {
    "model": "abc",
    "version": "0.1.0",
    "preset": "hand6",
    "parts": ["palm", "p1", "p2", "p3", "p4", "p5"],
    "dim": 4,
    "weights": [0.5] + [0.1] * 5,
}


def people(ids, seed=0, sides=None, digests=None):
    rng = np.random.default_rng(seed)
    count = len(ids)
    parts = rng.normal(size=(count, 6, 4)).astype(np.float32)
    parts /= np.linalg.norm(parts, axis=2, keepdims=True)
    words = {
        "persons": ids,
        "sides": sides or ["right"] * count,
        "names": [f"{i}.jpg" for i in range(count)],
        "digests": digests or [f"{seed}-{i}" for i in range(count)],
        "guessed": [""] * count,
    }
    strings = {name: np.asarray(value, dtype=np.str_) for name, value in words.items()}
    return Enrolled(parts, rng.uniform(0.2, 1, (count, 6)).astype(np.float32), **strings)


def made(tmp_path, hands):
    gallery = Gallery(HEAD, path=tmp_path / "g")
    gallery.enroll(hands, purpose="a test")
    return gallery


def test_what_was_enrolled_is_found_again_after_loading(tmp_path):
    hands = people(list("aabbcd"))
    made(tmp_path, hands)
    loaded = Gallery.open(tmp_path / "g", HEAD)
    assert len(loaded) == 6
    answers = loaded.search(hands.parts, hands.visibility, 3)
    assert [a[0].person for a in answers] == list("aabbcd")
    assert all(a[0].score == pytest.approx(1, abs=1e-5) for a in answers)
    assert [len(a) for a in answers] == [3] * 6


@pytest.mark.parametrize("block", [64, 2**20])
def test_the_search_is_exact_whatever_the_blocks(monkeypatch, block):
    monkeypatch.setattr("handmstn.gallery.BLOCK", block)
    gallery, probes = Gallery(HEAD, people([f"{i % 17:02d}" for i in range(90)])), people(["x"] * 11, 7)
    scores = match(
        (probes.parts, probes.visibility), (gallery.enrolled.parts, gallery.enrolled.visibility), gallery.weights
    )
    for row, answer in zip(scores, gallery.search(probes.parts, probes.visibility, 5), strict=True):
        best = {p: row[gallery.enrolled.persons == p].max() for p in set(gallery.enrolled.persons.tolist())}
        expected = sorted(best, key=lambda p: -best[p])[:5]
        assert [c.person for c in answer] == expected
        assert np.allclose([c.score for c in answer], [best[p] for p in expected], atol=1e-6)
        assert [row[c.row] for c in answer] == pytest.approx([c.score for c in answer], abs=1e-6)


def test_left_and_right_of_known_sides_are_not_compared_and_a_picture_does_not_find_itself():
    gallery = Gallery(HEAD, people(list("ab"), sides=["left", "right"]))
    e = gallery.enrolled
    answers = gallery.search(e.parts, e.visibility, 5, sides=np.asarray(["right", "unknown"]))
    assert [[c.person for c in a] for a in answers] == [["b"], ["b", "a"]]
    own = gallery.search(e.parts, e.visibility, 5, digests=e.digests)
    assert [[c.person for c in a] for a in own] == [["b"], ["a"]]


def test_a_removed_person_is_gone_from_every_file(tmp_path):
    made(tmp_path, people(list("aab")))
    gallery = Gallery.open(tmp_path / "g")
    gallery.enroll(people(list("ac"), 5), purpose="more")
    secret = gallery.enrolled.parts[gallery.enrolled.persons == "a"]
    assert gallery.remove("a", purpose="asked for it") == 3
    assert sorted(gallery.enrolled.persons.tolist()) == ["b", "c"]
    assert sorted(Gallery.open(tmp_path / "g").enrolled.persons.tolist()) == ["b", "c"]
    held = b"".join(p.read_bytes() for p in (tmp_path / "g").iterdir() if p.name != LOG)
    assert not any(row.tobytes() in held for row in secret)
    assert '"a"' not in held.decode("latin1")
    assert [line["what"] for line in gallery.log()] == ["enroll", "enroll", "remove"]
    with pytest.raises(UserError, match="nobody of this id is in the gallery: known: b, c"):
        gallery.remove("zz", purpose="x")
    gallery.remove("b", purpose="x")
    gallery.remove("c", purpose="x")
    assert not list((tmp_path / "g").glob("*.safetensors"))
    assert len(Gallery.open(tmp_path / "g")) == 0


def test_the_same_pictures_again_add_nothing_and_the_log_says_who_and_why(tmp_path):
    gallery = made(tmp_path, people(list("ab")))
    assert gallery.enroll(people(list("ab")), purpose="again") == 0
    gallery.log_search(["x.jpg"], ["none of them"])
    lines = gallery.log()
    assert [line["what"] for line in lines] == ["enroll", "search"]
    assert lines[0]["persons"] == ["a", "b"]
    assert lines[0]["purpose"] == "a test"
    with pytest.raises(UserError, match="--purpose"):
        gallery.enroll(people(list("c")), purpose=" ")


def test_galleries_merge_once(tmp_path):
    a, b = made(tmp_path / "1", people(list("ab"))), made(tmp_path / "2", people(list("cd"), 3))
    assert a.merge(b, purpose="one of two") == 2
    assert a.merge(b, purpose="again") == 0
    assert sorted(a.enrolled.persons.tolist()) == list("abcd")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("model", "other", "the model 'abc' .of handmstn 0.1.0."), ("preset", "eeprnet", "preset 'hand6'")],
)
def test_a_gallery_of_another_model_or_preset_is_refused(tmp_path, key, value, text):
    made(tmp_path, people(list("ab")))
    with pytest.raises(UserError, match=text):
        Gallery.open(tmp_path / "g", {**HEAD, key: value})
    with pytest.raises(UserError, match="made with something else"):
        Gallery({**HEAD, key: value}, path=tmp_path / "g").enroll(people(list("c")), purpose="x")


def test_empty_and_unfit_galleries_are_refused(tmp_path):
    probe = people(["x"])
    with pytest.raises(UserError, match="nobody is enrolled"):
        Gallery(HEAD).search(probe.parts, probe.visibility)
    with pytest.raises(ValueError, match="probes"):
        Gallery(HEAD, probe).search(probe.parts[:, :3], probe.visibility)
    with pytest.raises(UserError, match="found no index.json"):
        Gallery.open(tmp_path / "none")
    with pytest.raises(UserError, match="two people or more"):
        Gallery(HEAD, probe).threshold()


def test_the_threshold_is_what_strangers_among_the_enrolled_reach():
    gallery = Gallery(HEAD, people([f"{i // 2:03d}" for i in range(60)]))
    e = gallery.enrolled
    scores = match((e.parts, e.visibility), (e.parts, e.visibility), gallery.weights)
    scores[e.persons[:, None] == e.persons[None]] = -np.inf
    tops = scores.max(1)
    for fpir in (0.5, 0.1, 0.01):
        threshold, tries = gallery.threshold(fpir)
        assert tries == 60
        assert (tops >= threshold).mean() <= fpir
        assert (tops >= threshold - 1e-6).mean() > fpir - 1 / 30 or fpir < 1 / 60


def test_faiss_finds_the_same_as_the_exact_search():
    pytest.importorskip("faiss")
    gallery, probes = Gallery(HEAD, people([f"{i % 50:03d}" for i in range(400)])), people(["x"] * 9, 3)
    exact = gallery.search(probes.parts, probes.visibility, 4, visible=False)
    flat = gallery.search(probes.parts, probes.visibility, 4, visible=False, index="faiss-flat")
    assert [[c.row for c in a] for a in exact] == [[c.row for c in a] for a in flat]
    assert gallery.recall(probes.parts, probes.visibility, "faiss-flat", top=4) >= 0.9
    assert 0 < gallery.recall(probes.parts, probes.visibility, "faiss-hnsw", top=4) <= 1


@pytest.mark.parametrize("index", ["exact", "faiss-flat", "faiss-hnsw"])
def test_a_person_with_many_pictures_leaves_room_for_other_candidates(index):
    """faiss issue 2566: the nearest pictures are all of one person, and so is the whole answer."""
    pytest.importorskip("faiss")
    many = people(["often"] * 300 + [f"p{i}" for i in range(20)])
    probe = many.part(np.asarray([0]))
    many.parts[:300] = many.parts[0]  # all nearer than anybody else
    many.visibility[:300] = many.visibility[0]
    found = Gallery(HEAD, many).search(probe.parts, probe.visibility, 5, index=index, shortlist=50)[0]
    assert found[0].person == "often"
    assert len({candidate.person for candidate in found}) == 5


def test_a_removed_person_is_in_no_index_either(tmp_path):
    """faiss issues 883 and 3281: ids that stayed, or another one that went; here no index outlives a search."""
    pytest.importorskip("faiss")
    made(tmp_path, people([f"{i % 20:02d}" for i in range(60)]))
    gallery = Gallery.open(tmp_path / "g")
    probe = gallery.enrolled.part(np.flatnonzero(gallery.enrolled.persons == "07")[:1])
    gallery.remove("07", purpose="asked for it")
    for held in (gallery, Gallery.open(tmp_path / "g")):
        for index in ("exact", "faiss-flat", "faiss-hnsw"):
            found = held.search(probe.parts, probe.visibility, 19, index=index)[0]
            assert "07" not in {candidate.person for candidate in found}
            assert len({candidate.person for candidate in found}) == len(found)


def test_an_interrupted_enrollment_leaves_the_state_before_it_and_is_repeated_whole(tmp_path):
    made(tmp_path, people(list("ab")))
    code = """
        import os, sys
        sys.path.insert(0, {tests!r})
        import handmstn.gallery as g
        from test_gallery import HEAD, people
        write = g._write
        def half(path, block):
            path.write_bytes(b"half")
            os.kill(os.getpid(), 9)
        g._write = half
        g.Gallery(HEAD, path={path!r}).enroll(people(list("cd"), 9), purpose="killed")
    """
    words = {"tests": os.path.dirname(__file__), "path": str(tmp_path / "g")}
    words["path"] = words["path"]
    script = (
        textwrap.dedent(code)
        .format(tests=words["tests"], path=words["path"])
        .replace("g.Gallery(HEAD, path=", "from pathlib import Path\ng.Gallery(HEAD, path=Path(")
        .replace(").enroll(", ")).enroll(")
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(Gallery.open(tmp_path / "g").enrolled.persons.tolist()) == ["a", "b"]
    again = Gallery.open(tmp_path / "g")
    assert again.enroll(people(list("cd"), 9), purpose="repeated") == 2
    assert (tmp_path / "g/000002.safetensors").stat().st_size > 100
    assert len(Gallery.open(tmp_path / "g")) == 4


def in_a_process_that_dies(work, calls):
    """Run in a forked process that ends, without any cleaning up, before the given call of the file system."""
    child = os.fork()
    if child == 0:
        left = [calls]

        def counted(function):
            def call(*args, **how):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return function(*args, **how)

            return call

        for name in ("replace", "rename", "unlink", "remove", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_enrollment_that_dies_at_any_moment_leaves_the_state_before_or_after_it_and_can_be_repeated(tmp_path):
    died, states = 0, set()
    for calls in range(30):
        folder = tmp_path / str(calls)
        made(folder, people(list("ab")))
        code = in_a_process_that_dies(
            lambda folder=folder: Gallery.open(folder / "g").enroll(people(list("cd"), 9), purpose="killed"), calls
        )
        after = sorted(Gallery.open(folder / "g").enrolled.persons.tolist())
        assert after in (list("ab"), list("abcd"))
        if code == 0:
            break
        died, states = died + 1, states | {len(after)}
        gallery = Gallery.open(folder / "g")
        gallery.enroll(people(list("cd"), 9), purpose="repeated")
        assert sorted(Gallery.open(folder / "g").enrolled.persons.tolist()) == list("abcd")
        logged = [p for line in gallery.log() if line["what"] == "enroll" for p in line["persons"]]
        gallery.enroll(people(["e"], 11), purpose="next")
        logged = [p for line in gallery.log() if line["what"] == "enroll" for p in line["persons"]]
        assert sorted(logged) == list("abcde"), calls
    assert died >= 4
    assert states == {2, 4}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_removal_that_dies_at_any_moment_can_be_repeated_until_no_file_holds_the_person(tmp_path):
    died = 0
    for calls in range(40):
        folder = tmp_path / str(calls)
        gallery = made(folder, people(list("aab")))
        gallery.enroll(people(list("ac"), 5), purpose="more")
        secret = gallery.enrolled.parts[gallery.enrolled.persons == "a"]
        code = in_a_process_that_dies(
            lambda folder=folder: Gallery.open(folder / "g").remove("a", purpose="killed"), calls
        )
        again = Gallery.open(folder / "g")
        assert set("bc") <= set(again.enrolled.persons.tolist())
        if "a" in again.enrolled.persons:
            again.remove("a", purpose="repeated")
        else:
            again.enroll(people(["d"], 6), purpose="any command that writes")
        held = b"".join(p.read_bytes() for p in (folder / "g").iterdir() if p.name != LOG)
        assert not any(row.tobytes() in held for row in secret), calls
        assert "a" not in Gallery.open(folder / "g").enrolled.persons
        if code == 0:
            break
        died += 1
    assert died >= 6


def test_files_of_a_gallery_that_are_broken_or_gone_are_named_in_one_line(tmp_path):
    made(tmp_path, people(list("ab")))
    file = tmp_path / "g/000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"000001\.safetensors"):
        Gallery.open(tmp_path / "g")
    file.unlink()
    with pytest.raises(UserError, match=r"000001\.safetensors"):
        Gallery.open(tmp_path / "g")
    file.write_bytes(whole)
    index = tmp_path / "g/index.json"
    index.write_text(index.read_text()[:40])
    with pytest.raises(UserError, match=r"index\.json"):
        Gallery.open(tmp_path / "g")


def test_a_gallery_of_another_version_with_the_same_model_is_read(tmp_path):
    made(tmp_path, people(list("ab")))
    assert len(Gallery.open(tmp_path / "g", {**HEAD, "version": "0.9.0"})) == 2


def test_without_faiss_the_search_is_exact_and_an_index_of_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    gallery, probes = Gallery(HEAD, people(list("abc"))), people(["x"], 3)
    assert len(gallery.search(probes.parts, probes.visibility)[0]) == 3
    with pytest.raises(UserError, match=r"--index faiss-flat.*handmstn\[faiss\]"):
        gallery.search(probes.parts, probes.visibility, index="faiss-flat")


def test_an_enrollment_that_a_kill_kept_from_the_log_is_logged_by_the_next_command(tmp_path):
    gallery = made(tmp_path, people(list("aab")))
    (tmp_path / "g" / LOG).write_text("")
    gallery.enroll(people(list("c"), 4), purpose="later")
    lines = [(line["what"], line["persons"], line["count"]) for line in gallery.log()]
    assert lines == [("enroll", ["a", "b"], 3), ("enroll", ["c"], 1)]


def test_a_search_beside_an_enrollment_sees_the_state_before_it(tmp_path):
    made(tmp_path, people(list("ab")))
    from tenfold.growing import Growing

    with Growing.open(tmp_path / "g", kind="handmstn.gallery", writing=True) as writing:
        with writing.adding(".safetensors", {"count": 1}) as path:
            path.write_bytes((tmp_path / "g/000001.safetensors").read_bytes())
            assert len(Gallery.open(tmp_path / "g")) == 2
        assert len(Gallery.open(tmp_path / "g")) == 4
        with pytest.raises(UserError, match="another command is adding to it"):
            Gallery.open(tmp_path / "g").enroll(people(list("z"), 8), purpose="at once")


def test_joined_sets_keep_their_order():
    whole = joined([people(list("ab")), people(list("c"), 2)])
    assert whole.persons.tolist() == list("abc")
    assert json.dumps(whole.classes.tolist()) == '["a:right", "b:right", "c:right"]'
