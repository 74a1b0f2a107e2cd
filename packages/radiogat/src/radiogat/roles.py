"""Which column of a file means what, and where its header is."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from radiogat.channels import RADIOS, radio_of
from radiogat.planes import check_plane
from radiogat.tables import Layout, column, parquet_layout, sniff, squeezed
from tenfold import UserError
from tenfold.errors import did_you_mean

Missing = Literal["refuse", "drop"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "x": ("x", "easting", "x_m", "utm_x", "utm_e"),
    "y": ("y", "northing", "y_m", "utm_y", "utm_n"),
    "lon": (
        *(
            "lon",
            "longitude",
            "lng",
            "long",
            "currentlongitude",
            "gps_longitude",
            "gps_lon",
            "longitude_deg",
            "lon_deg",
        ),
        *("all_longitude_decimal_degree", "all_longitude", "location_longitude", "geo_longitude"),
        *(
            "longitude_wgs84",
            "lon_wgs84",
            "wgs84_lon",
            "longitude_dd",
            "lon_dd",
            "decimal_longitude",
            "position_longitude",
        ),
    ),
    "lat": (
        *("lat", "latitude", "currentlatitude", "gps_latitude", "gps_lat", "latitude_deg", "lat_deg"),
        *("all_latitude_decimal_degree", "all_latitude", "location_latitude", "geo_latitude"),
        *("latitude_wgs84", "lat_wgs84", "wgs84_lat", "latitude_dd", "lat_dd", "decimal_latitude", "position_latitude"),
    ),
    "freq_mhz": (
        *("freq_mhz", "frequency_mhz", "freq", "frequency", "mhz", "band_mhz", "dl_frequency", "carrier_frequency"),
        *("center_frequency", "downlink_frequency", "dl_freq", "lte_primary_freq_mhz", "frequency_hz", "freq_hz"),
        *("frequency_khz", "freq_khz", "frequency_ghz", "freq_ghz"),
    ),
    "channel": (
        *(
            "earfcn",
            "dl_earfcn",
            "earfcn_dl",
            "serving_cell_dl_earfcn",
            "serving_cell_earfcn",
            "serving_cell_earfcn_dl",
        ),
        *("lte_earfcn", "lte_dl_earfcn", "lte_primary_earfcn", "nr_arfcn", "nrarfcn", "nr_dl_arfcn", "ssb_arfcn"),
        *("uarfcn", "dl_uarfcn", "arfcn", "bcch", "all_scanned_arfcn", "channel_number", "channel", "ch"),
        *("lte_ue_serving_cell_earfcn", "lte_serving_cell_earfcn_dl", "lte_serving_cell_earfcn"),
    ),
    "band": ("band", "lte_band", "nr_band", "serving_cell_band", "freq_band", "frequency_band", "bands"),
    "radio": (
        *("radio", "networktech", "network_tech", "technology", "tech", "rat", "radio_type", "network_type"),
        *("networktype", "system", "type", "networkmode"),
    ),
    "rss_dbm": (
        *("rss_dbm", "rsrp_dbm", "rsrp", "ss_rsrp", "ssrsrp", "serving_cell_rsrp", "lte_rsrp", "nr_rsrp", "nr_ss_rsrp"),
        *("lte_primary_rsrp_dbm", "lte_primary_rsrp", "lte_ue_serving_cell_rsrp", "lte_serving_cell_rsrp"),
        *("rscp", "rscp_dbm", "rss", "rssi_dbm", "rssi", "rxlev", "rxlev_dbm", "rx_level", "rxl", "all_scanned_rxlev"),
        *("power_dbm", "power", "received_power", "level_dbm", "level", "signal", "signal_dbm", "averagesignal"),
        *(
            "signal_strength",
            "signal_level",
            "rx_power",
            "rx_level_dbm",
            "received_level",
            "prx",
            "amplitude",
            "amplitude_dbm",
        ),
        *("field_strength_dbm", "dbm"),
    ),
    "cell": (
        *("pci", "physical_cell_identity", "physical_cell_id", "serving_cell_pci", "lte_primary_pci", "lte_pci"),
        *("lte_serving_cell_pci", "lte_ue_serving_cell_pci", "nr_pci", "phys_cell_id", "psc", "bsic"),
        *("cellid", "cell_id", "eci", "nci", "cid", "ci", "cell", "bssid", "mac", "netid"),
    ),
    "time": ("timestamp", "time", "datetime", "date_time", "utc", "gps_time", "firstseen", "measured_at", "measured"),
}
"""What a column is called in files, small or capital, without unit; the first match counts."""

_CELLMAPPER = (
    *("latitude", "longitude", "altitude", "MCC", "MNC", "LAC", "CID", "signal", "type", "subtype", "ARFCN", "PSC"),
)
_MLS = (
    *(
        "radio",
        "mcc",
        "net",
        "area",
        "cell",
        "unit",
        "lon",
        "lat",
        "range",
        "samples",
        "changeable",
        "created",
        "updated",
    ),
    "averageSignal",
)
_SERVING = frozenset({"lte pcell", "nr pcell", "pcell", "serving", "serving cell", "lte serving", "nr serving"})
"""What stands in brackets behind the values of the cell that serves."""
UNITS = {"hz": 1e-6, "khz": 1e-3, "mhz": 1.0, "ghz": 1e3}
_AS_NAME = re.compile(r"(?<![\d.,])(\d+(?:[.,]\d+)?)\s*(hz|khz|mhz|ghz)(?![a-z0-9])", re.IGNORECASE)


def frequencies_in(text: str) -> set[float]:
    """All MHz that a text says: ``1842.5 MHz``, ``1,8 GHz``."""
    return {float(match[1].replace(",", ".")) * UNITS[match[2].lower()] for match in _AS_NAME.finditer(text)}


def frequency_in(text: str) -> float | None:
    """MHz that a text says; None where it says none, or several."""
    found = frequencies_in(text)
    return found.pop() if len(found) == 1 else None


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a file of measurements is read.

    Args:
        columns: role (a key of ``COLUMNS``) -> name, where a file calls it otherwise.
        crs: plane of x and y; or the plane that lat and lon go to, in place of UTM.
        sign: -1 where the column holds path loss or other negated values.
        freq_mhz: frequency of files without a column of it; of rtl_power's sweeps, the one that is taken.
        missing: refuse a file with rows that lack a value, or drop these rows, with a count.
        radio: lte, nr, umts, gsm, pcs or wifi: what channel and band numbers belong to, where the file does not say.
        by: column of the cell's identity, as ``pci``; with ``only``, one cell's map.
        only: values of that column whose rows are taken.
        track: file of positions over time, for files that have times and no positions.
        at: the one position, (lat, lon), of a file that has none.
        range: lowest and highest power that is a measurement, as the file has them; others mark missing ones.
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    crs: str | None = None
    sign: int = 1
    freq_mhz: float | None = None
    missing: Missing = "refuse"
    radio: str | None = None
    by: str | None = None
    only: Sequence[str] = ()
    track: str | Path | None = None
    at: tuple[float, float] | None = None
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for role in self.columns:
            if role not in COLUMNS:
                raise UserError(f"unknown column role '{role}': {did_you_mean(role, COLUMNS)}")
        if self.crs is not None:
            check_plane(self.crs)
        if self.radio is not None and self.radio not in RADIOS:
            raise UserError(f"radio '{self.radio}': {did_you_mean(self.radio, RADIOS)}")


class Roles:
    """Which column of a file has which role.

    Args:
        path: the file, for messages.
        layout: how it is written.
        given: role -> name, where the file calls it otherwise.

    Raises:
        UserError: a column that is needed occurs twice, or a given name not at all.
    """

    def __init__(self, path: Path, layout: Layout, given: Mapping[str, str]) -> None:
        self.path = path
        self.names = layout.names
        units = layout.units or ("",) * len(layout.names)
        self.columns = [column(name, unit) for name, unit in zip(layout.names, units, strict=True)]
        self.given = given

    def find(self, role: str) -> int | None:
        """Number of the column with this role, or None.

        Raises:
            UserError: the name that was given for it is not there, or which of several columns is meant is not clear.
        """
        if role in self.given:
            name = self.given[role]
            if re.fullmatch(r"#\d+", name):
                if not 1 <= int(name[1:]) <= len(self.names):
                    raise UserError(f"{self.path}: no column {name}; there are {len(self.names)}")
                return int(name[1:]) - 1
            same = [i for i, known in enumerate(self.names) if known == name]
            if not same:
                raise UserError(f"{self.path}: no column '{name}': {did_you_mean(name, self.names)}")
        else:
            same = self._called(role)
        if len(same) > 1 and len({self.names[i] for i in same}) < len(same):
            self._refuse_doubled()
        if len(same) > 1 and role not in {"time", "radio"}:
            serving = [i for i in same if self.columns[i].unit in _SERVING]
            if len(serving) == 1:
                return serving[0]
            shown = ", ".join(self.names[i] for i in same)
            raise UserError(f"{self.path}: {shown}: which is meant? --columns {role}=NAME says it")
        return same[0] if same else None

    def also(self, role: str, chosen: int) -> list[str]:
        """Names of other columns that may have the same role, by another of its names."""
        names = {name for alias in COLUMNS[role] for name in (alias, squeezed(alias))}
        return [c.name for i, c in enumerate(self.columns) if i != chosen and c.keys & names and c.index is None]

    def _called(self, role: str) -> list[int]:
        """Numbers of the columns that are called by the first name of a role that occurs."""
        for alias in COLUMNS[role]:
            same = [i for i, c in enumerate(self.columns) if c.keys & {alias, squeezed(alias)} and c.index in (None, 0)]
            if same:
                return same
        return []

    def _refuse_doubled(self) -> None:
        """Name all columns that are needed and occur twice.

        Raises:
            UserError: always.
        """
        shown, ways = [], []
        for role in COLUMNS:
            same = [] if role in self.given else self._called(role)
            again = [i for i in same if self.names[i] == self.names[same[0]]]
            if len(again) > 1:
                numbers = " and ".join(f"#{i + 1}" for i in again)
                shown.append(f"{len(again)} columns are called '{self.names[again[0]]}' ({numbers})")
                ways.append(f"{role}=#{again[0] + 1}")
        for role, name in self.given.items():
            if (count := self.names.count(name)) > 1:
                shown.append(f"{count} columns are called '{name}'")
                ways.append(f"{role}=#{self.names.index(name) + 1}")
        raise UserError(
            f"{self.path}: {', '.join(shown)}: take one by its number, --columns {','.join(ways)} for example"
        )

    def family(self, first: int) -> list[int]:
        """A column and those that differ from it by the index in brackets alone, in order."""
        plain = self.columns[first].plain
        if self.columns[first].index is None:
            return [first]
        return [i for i, c in enumerate(self.columns) if c.plain == plain and c.index is not None]

    def named(self, name: str) -> int:
        """Number of the column that the user names: as it is written, or as its plain name or a role's alias.

        Raises:
            UserError: there is none.
        """
        plain = column(name).plain
        for i, c in enumerate(self.columns):
            if c.name == name or c.plain == plain:
                return i
        if plain in COLUMNS["cell"] or plain.endswith("pci"):
            ends = [i for i, c in enumerate(self.columns) if c.plain.endswith(plain)]
            if plain == "pci":
                ends += [i for i, c in enumerate(self.columns) if c.plain.startswith("physical_cell_id")]
            if ends:
                return ends[0]
        raise UserError(f"{self.path}: no column '{name}': {did_you_mean(name, self.names)}")


def _is_header(given: Mapping[str, str]) -> Any:
    """A test whether a line's fields are column names: a power, and a position or another known role."""
    roles = {role: {*names, *map(squeezed, names)} for role, names in COLUMNS.items()}

    def is_header(fields: Sequence[str]) -> bool:
        plain = frozenset().union(*(column(field).keys for field in fields))
        own = {role: bool(plain & names) or _given(given.get(role), fields) for role, names in roles.items()}
        place = (own["x"] and own["y"]) or (own["lon"] and own["lat"])
        wide = sum(frequency_in(field) is not None for field in fields) > 0
        return place or (own["rss_dbm"] and (own["freq_mhz"] or own["channel"])) or (wide and own["time"])

    return is_header


def _given(name: str | None, fields: Sequence[str]) -> bool:
    """Whether a line has the column that the user names, or so many that it has its number."""
    if name is None:
        return False
    return int(name[1:]) <= len(fields) if re.fullmatch(r"#\d+", name) else name in fields


def layout_of(path: Path, columns: Mapping[str, str] | None = None) -> Layout:
    """How a file is written; of exports without a header (CellMapper, Mozilla's cells), with the header that they have not.

    Raises:
        UserError: no such file, an empty one, or nothing in it is a header.
    """
    if path.suffix.lower() in {".parquet", ".pq"}:
        return parquet_layout(path)
    layout = sniff(path, _is_header(columns or {}))
    if layout.skip:
        return layout
    first = layout.names
    if is_sweep(first):
        return layout
    if len(first) == len(_CELLMAPPER) and all(_within(v, top) for v, top in zip(first[:2], (90, 180), strict=True)):
        return dataclasses.replace(layout, names=_CELLMAPPER)
    if len(first) == len(_MLS) and radio_of(first[0]) and _within(first[6], 180) and _within(first[7], 90):
        return dataclasses.replace(layout, names=_MLS)
    if len(first) >= 9 and first[0] in {"2G", "3G", "4G", "5G"} and _within(first[7], 90):
        raise UserError(f"{path}: NetMonster's list of cells (.ntm) holds no powers: export its log of measurements")
    if any(re.fullmatch(r"[-+]?\d+(?:[.,]\d+)?", name) for name in first):
        raise UserError(
            f"{path}: no line of column names that are known, and an unknown layout; its fields begin {', '.join(first[:4])};"
            " --columns lat=NAME,lon=NAME,rss_dbm=NAME,freq_mhz=NAME names those of its header"
        )
    return dataclasses.replace(layout, skip=1)


def _within(text: str, top: float) -> bool:
    try:
        return abs(float(text)) <= top
    except ValueError:
        return False


def is_sweep(fields: Sequence[str]) -> bool:
    """Whether a line is a sweep of rtl_power or hackrf_sweep: date, time, Hz low, Hz high, Hz step, samples, dB, dB ..."""
    if (
        len(fields) < 7
        or not re.fullmatch(r"\d{4}-\d\d-\d\d", fields[0])
        or not re.fullmatch(r"\d\d:\d\d:\d\d(?:\.\d+)?", fields[1])
    ):
        return False
    return all(re.fullmatch(r"[-+]?\d+(?:\.\d+)?", field) for field in fields[2:6])
