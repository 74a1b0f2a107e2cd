"""Channel numbers and bands to MHz: LTE, NR, UMTS, GSM and Wi-Fi, downlink."""

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold import UserError

Floats = NDArray[np.float64]

_LTE = (
    # band, lowest downlink frequency in MHz, first and last EARFCN
    (1, 2110, 0, 599),
    (2, 1930, 600, 1199),
    (3, 1805, 1200, 1949),
    (4, 2110, 1950, 2399),
    (5, 869, 2400, 2649),
    (6, 875, 2650, 2749),
    (7, 2620, 2750, 3449),
    (8, 925, 3450, 3799),
    (9, 1844.9, 3800, 4149),
    (10, 2110, 4150, 4749),
    (11, 1475.9, 4750, 4949),
    (12, 729, 5010, 5179),
    (13, 746, 5180, 5279),
    (14, 758, 5280, 5379),
    (17, 734, 5730, 5849),
    (18, 860, 5850, 5999),
    (19, 875, 6000, 6149),
    (20, 791, 6150, 6449),
    (21, 1495.9, 6450, 6599),
    (22, 3510, 6600, 7399),
    (23, 2180, 7500, 7699),
    (24, 1525, 7700, 8039),
    (25, 1930, 8040, 8689),
    (26, 859, 8690, 9039),
    (27, 852, 9040, 9209),
    (28, 758, 9210, 9659),
    (29, 717, 9660, 9769),
    (30, 2350, 9770, 9869),
    (31, 462.5, 9870, 9919),
    (32, 1452, 9920, 10359),
    (33, 1900, 36000, 36199),
    (34, 2010, 36200, 36349),
    (35, 1850, 36350, 36949),
    (36, 1930, 36950, 37549),
    (37, 1910, 37550, 37749),
    (38, 2570, 37750, 38249),
    (39, 1880, 38250, 38649),
    (40, 2300, 38650, 39649),
    (41, 2496, 39650, 41589),
    (42, 3400, 41590, 43589),
    (43, 3600, 43590, 45589),
    (44, 703, 45590, 46589),
    (45, 1447, 46590, 46789),
    (46, 5150, 46790, 54539),
    (47, 5855, 54540, 55239),
    (48, 3550, 55240, 56739),
    (49, 3550, 56740, 58239),
    (50, 1432, 58240, 59089),
    (51, 1427, 59090, 59139),
    (52, 3300, 59140, 60139),
    (53, 2483.5, 60140, 60254),
    (54, 1670, 60255, 60304),
    (65, 2110, 65536, 66435),
    (66, 2110, 66436, 67335),
    (67, 738, 67336, 67535),
    (68, 753, 67536, 67835),
    (69, 2570, 67836, 68335),
    (70, 1995, 68336, 68585),
    (71, 617, 68586, 68935),
    (72, 461, 68936, 68985),
    (73, 460, 68986, 69035),
    (74, 1475, 69036, 69465),
    (75, 1432, 69466, 70315),
    (76, 1427, 70316, 70365),
    (85, 728, 70366, 70545),
    (87, 420, 70546, 70595),
    (88, 422, 70596, 70645),
    (103, 757, 70646, 70655),
)
"""Source: 3GPP TS 36.101, table 5.7.3-1: F_DL = F_low + 0.1 (N_DL - N_offs)."""

_NR = {
    # band: downlink in MHz
    1: (2110, 2170),
    2: (1930, 1990),
    3: (1805, 1880),
    5: (869, 894),
    7: (2620, 2690),
    8: (925, 960),
    12: (729, 746),
    13: (746, 756),
    14: (758, 768),
    18: (860, 875),
    20: (791, 821),
    24: (1525, 1559),
    25: (1930, 1995),
    26: (859, 894),
    28: (758, 803),
    29: (717, 728),
    30: (2350, 2360),
    31: (462.5, 467.5),
    34: (2010, 2025),
    38: (2570, 2620),
    39: (1880, 1920),
    40: (2300, 2400),
    41: (2496, 2690),
    46: (5150, 5925),
    47: (5855, 5925),
    48: (3550, 3700),
    50: (1432, 1517),
    51: (1427, 1432),
    53: (2483.5, 2495),
    54: (1670, 1675),
    65: (2110, 2200),
    66: (2110, 2200),
    67: (738, 758),
    70: (1995, 2020),
    71: (617, 652),
    72: (461, 466),
    74: (1475, 1518),
    75: (1432, 1517),
    76: (1427, 1432),
    77: (3300, 4200),
    78: (3300, 3800),
    79: (4400, 5000),
    85: (728, 746),
    90: (2496, 2690),
    91: (1427, 1432),
    92: (1432, 1517),
    93: (1427, 1432),
    94: (1432, 1517),
    96: (5925, 7125),
    100: (919.4, 925),
    101: (1900, 1910),
    102: (5925, 6425),
    104: (6425, 7125),
    105: (612, 652),
    257: (26500, 29500),
    258: (24250, 27500),
    259: (39500, 43500),
    260: (37000, 40000),
    261: (27500, 28350),
    262: (47200, 48200),
    263: (57000, 71000),
}
"""Source: 3GPP TS 38.101-1 and -2, tables 5.2-1."""

_UMTS: tuple[tuple[float, Iterable[int]], ...] = (
    # offset in MHz, UARFCN of the downlink
    (0, range(10562, 10839)),  # I
    (0, range(9662, 9939)),  # II
    (1850.1, range(412, 688, 25)),
    (1575, range(1162, 1514)),  # III
    (1805, range(1537, 1739)),  # IV
    (1735.1, range(1887, 2088, 25)),
    (0, range(4357, 4459)),  # V, and VI within it
    (670.1, (1007, 1012, 1032, 1037, 1062, 1087)),
    (2175, range(2237, 2564)),  # VII
    (2105.1, range(2587, 2913, 25)),
    (340, range(2937, 3089)),  # VIII
    (0, range(9237, 9388)),  # IX
    (1490, range(3112, 3389)),  # X
    (1430.1, range(3412, 3688, 25)),
    (736, range(3712, 3788)),  # XI
    (-37, range(3842, 3904)),  # XII
    (-54.9, (3932, 3957, 3962, 3987, 3992)),
    (-55, range(4017, 4044)),  # XIII
    (-64.9, (4067, 4092)),
    (-63, range(4117, 4144)),  # XIV
    (-72.9, (4167, 4192)),
    (735, range(712, 764)),  # XIX
    (720.1, (787, 812, 837)),
    (-109, range(4512, 4639)),  # XX
    (1326, range(862, 913)),  # XXI
    (2580, range(4662, 5039)),  # XXII
    (910, range(5112, 5414)),  # XXV
    (674.1, range(6292, 6593, 25)),
    (-291, range(5762, 5914)),  # XXVI
    (-325.9, (5937, 5962, 5987, 5992, 6012, 6017, 6037, 6042, 6062, 6067, 6087)),
    (131, range(6617, 6814)),  # XXXII
    (87.1, range(6837, 7013, 25)),
    (0, range(9404, 9597)),  # TDD at 1880 to 1920, 2010, 2300 and 2570 MHz
    (0, range(10054, 10122)),
    (0, range(11504, 11997)),
    (0, range(12854, 13097)),
)
"""Source: 3GPP TS 25.101, tables 5.1 and 5.2, and TS 25.102: F = offset + N / 5."""

RADIOS = ("lte", "nr", "umts", "gsm", "pcs", "wifi")
_RADIO_WORDS = {
    "lte": (
        *("lte", "4g", "4g+", "lte+", "eutra", "e-utra", "eutran", "e-utran", "lte-a", "lte_a", "lte_ca", "lte-ca"),
        *("lte ca", "lte fdd", "lte tdd", "lte-fdd", "lte-tdd", "tdd lte", "fdd lte", "lte-m", "nb-iot"),
    ),
    "nr": (
        *("nr", "5g", "5g-sa", "5g-nsa", "5g sa", "5g nsa", "5g_sa", "5g_nsa", "nr-sa", "nr-nsa", "nr sa", "nr nsa"),
        *("nr_sa", "nr_nsa", "5gnr", "5g nr", "5g-nr", "nr5g", "nr5g-sa", "nr5g-nsa"),
    ),
    "umts": ("umts", "3g", "wcdma", "w-cdma", "hspa", "hspa+", "hspap", "hsdpa", "hsupa", "utra", "utran"),
    "gsm": ("gsm", "2g", "edge", "gprs", "geran"),
    "wifi": ("wifi", "wlan", "wi-fi", "802.11"),
}


def radio_of(word: str) -> str | None:
    """lte, nr, umts, gsm or wifi, of what a tool calls it; None for anything else."""
    plain = word.strip().lower()
    return next((radio for radio, words in _RADIO_WORDS.items() if plain in words), None)


def _lte(n: Floats) -> Floats:
    # 0 is the edge of band 1, where no carrier can lie; phones write it for "unknown"
    mhz = np.full(n.shape, np.nan)
    for _, low, first, last in _LTE:
        mhz = np.where((n >= max(first, 1)) & (n <= last), low + 0.1 * (n - first), mhz)
    return mhz


def _nr(n: Floats) -> Floats:
    # FR1 begins at 410 MHz and ends at 7125 MHz: what lies below and between is some other number
    parts = [(n >= 82000) & (n < 600000), (n >= 600000) & (n <= 875000), (n >= 2016667) & (n <= 3279165)]
    values = [0.005 * n, 3000 + 0.015 * (n - 600000), 24250.08 + 0.06 * (n - 2016667)]
    return np.select(parts, values, np.nan)


def _umts(n: Floats) -> Floats:
    mhz = np.full(n.shape, np.nan)
    for offset, numbers in _UMTS:
        mhz = np.where(np.isin(n, list(numbers)), offset + n / 5, mhz)
    return mhz


def _gsm(n: Floats) -> Floats:
    return _of_gsm(n, [((n >= 512) & (n <= 885), 1805.2 + 0.2 * (n - 512))])


def _pcs(n: Floats) -> Floats:
    return _of_gsm(n, [((n >= 512) & (n <= 810), 1930.2 + 0.2 * (n - 512))])


def _of_gsm(n: Floats, high: list[tuple[NDArray[np.bool_], Floats]]) -> Floats:
    """Frequencies of all bands but 1800 and 1900, and of the given one of these."""
    parts = [
        ((n >= 0) & (n <= 124), 935 + 0.2 * n),
        ((n >= 940) & (n <= 1023), 935 + 0.2 * (n - 1024)),
        ((n >= 128) & (n <= 251), 869.2 + 0.2 * (n - 128)),
        ((n >= 259) & (n <= 293), 460.6 + 0.2 * (n - 259)),
        ((n >= 306) & (n <= 340), 489.0 + 0.2 * (n - 306)),
        ((n >= 438) & (n <= 511), 747.2 + 0.2 * (n - 438)),
        *high,
    ]
    return np.select([rows for rows, _ in parts], [values for _, values in parts], np.nan)


def _wifi(n: Floats) -> Floats:
    # of 5 GHz what the band has: other numbers are of 6 GHz, or of 4.9 GHz in Japan, which a number alone cannot tell
    five = ((n >= 32) & (n <= 144) & (n % 2 == 0)) | ((n >= 149) & (n <= 177) & (n % 2 == 1))
    parts = [(n >= 1) & (n <= 13), n == 14, five]
    return np.select(parts, [2407 + 5 * n, np.full(n.shape, 2484.0), 5000 + 5 * n], np.nan)


_CHANNELS = {"lte": _lte, "nr": _nr, "umts": _umts, "gsm": _gsm, "pcs": _pcs, "wifi": _wifi}


def channel_mhz(number: ArrayLike, radio: str) -> Floats:
    """Downlink frequency in MHz of channel numbers; NaN where the number is no channel.

    Args:
        number: EARFCN (lte), NR-ARFCN (nr), UARFCN (umts), ARFCN (gsm: 512 to 885 as DCS 1800; pcs: 512 to 810 as PCS 1900)
            or channel (wifi: 2.4 GHz to 14, 5 GHz from 32).
        radio: lte, nr, umts, gsm, pcs or wifi.

    Source: 3GPP TS 36.101 5.7.3, TS 38.104 5.4.2.1, TS 25.101 5.4.4, TS 45.005 2; IEEE 802.11.
    """
    if radio not in RADIOS:
        raise UserError(f"unknown radio '{radio}': expected one of {', '.join(RADIOS)}")
    n = np.asarray(number, dtype=np.float64)
    return np.where(n == np.floor(n), _CHANNELS[radio](n), np.nan)


def band_mhz(name: str, radio: str | None = None) -> float:
    """The middle of a band's downlink in MHz: B3, n78, "LTE 1800 (Band 3)", 20; NaN where the band is not known.

    Of a name with several bands (B3+B7) none is taken.

    Args:
        name: what the file calls the band; a bare number needs ``radio``.
        radio: lte, nr or umts, where the name does not say which.
    """
    text = name.strip().lower()
    of_nr = re.findall(r"(?<![a-z0-9])n(\d{1,3})(?![a-z0-9])", text)
    numbers = re.findall(r"(?<![a-z0-9])b(\d{1,3})(?![a-z0-9])", text)
    if re.match(r"(nr|5g)", text):
        radio = "nr"
    either = re.findall(r"band[\s_-]*(\d{1,3})(?![a-z0-9])", text)
    if (bare := re.fullmatch(r"\d{1,3}", text)) is not None and radio is not None:
        either = [bare[0]]
    (of_nr if radio == "nr" else numbers).extend(either)
    found = {(True, int(n)) for n in of_nr} | {(False, int(n)) for n in numbers}
    if len(found) != 1 or (radio in {"gsm", "pcs", "wifi"}):
        return float("nan")
    nr, number = found.pop()
    if nr:
        low, high = _NR.get(number, (float("nan"), float("nan")))
        return (low + high) / 2
    return next((low + (last + 1 - first) * 0.1 / 2 for band, low, first, last in _LTE if band == number), float("nan"))
