"""Channel numbers and bands to MHz: LTE, NR, UMTS, GSM and Wi-Fi, downlink."""

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
    20: (791, 821),
    25: (1930, 1995),
    28: (758, 803),
    38: (2570, 2620),
    40: (2300, 2400),
    41: (2496, 2690),
    48: (3550, 3700),
    66: (2110, 2200),
    71: (617, 652),
    77: (3300, 4200),
    78: (3300, 3800),
    79: (4400, 5000),
    257: (26500, 29500),
    258: (24250, 27500),
    260: (37000, 40000),
    261: (27500, 28350),
}
"""Source: 3GPP TS 38.101-1 and -2, tables 5.2-1."""

RADIOS = ("lte", "nr", "umts", "gsm", "wifi")
_RADIO_WORDS = {
    "lte": ("lte", "4g", "eutra", "e-utra", "lte-a", "lte_ca", "lte fdd", "lte tdd"),
    "nr": ("nr", "5g", "5g-sa", "5g-nsa", "nr-sa", "5gnr", "nr5g"),
    "umts": ("umts", "3g", "wcdma", "hspa", "hspa+", "hsdpa", "utra"),
    "gsm": ("gsm", "2g", "edge", "gprs"),
    "wifi": ("wifi", "wlan", "wi-fi", "802.11"),
}


def radio_of(word: str) -> str | None:
    """lte, nr, umts, gsm or wifi, of what a tool calls it; None for anything else."""
    plain = word.strip().lower()
    return next((radio for radio, words in _RADIO_WORDS.items() if plain in words), None)


def _lte(n: Floats) -> Floats:
    mhz = np.full(n.shape, np.nan)
    for _, low, first, last in _LTE:
        mhz = np.where((n >= first) & (n <= last), low + 0.1 * (n - first), mhz)
    return mhz


def _nr(n: Floats) -> Floats:
    parts = [(n >= 0) & (n < 600000), (n >= 600000) & (n < 2016667), (n >= 2016667) & (n <= 3279165)]
    values = [0.005 * n, 3000 + 0.015 * (n - 600000), 24250.08 + 0.06 * (n - 2016667)]
    return np.select(parts, values, np.nan)


def _umts(n: Floats) -> Floats:
    return np.where((n >= 412) & (n <= 10838), n / 5, np.nan)


def _gsm(n: Floats) -> Floats:
    # 512 to 885 are DCS 1800 in Europe and Asia; the same numbers are PCS 1900 in the Americas
    parts = [(n >= 0) & (n <= 124), (n >= 975) & (n <= 1023), (n >= 512) & (n <= 885), (n >= 128) & (n <= 251)]
    values = [935 + 0.2 * n, 935 + 0.2 * (n - 1024), 1805.2 + 0.2 * (n - 512), 869.2 + 0.2 * (n - 128)]
    return np.select(parts, values, np.nan)


def _wifi(n: Floats) -> Floats:
    parts = [(n >= 1) & (n <= 13), n == 14, (n >= 32) & (n <= 196)]
    return np.select(parts, [2407 + 5 * n, np.full(n.shape, 2484.0), 5000 + 5 * n], np.nan)


def channel_mhz(number: ArrayLike, radio: str) -> Floats:
    """Downlink frequency in MHz of channel numbers; NaN where the number is no channel.

    Args:
        number: EARFCN (lte), NR-ARFCN (nr), UARFCN (umts), ARFCN (gsm: 512 to 885 as DCS 1800) or channel (wifi: 2.4 GHz to
            14, 5 GHz from 32).
        radio: lte, nr, umts, gsm or wifi.

    Source: 3GPP TS 36.101 5.7.3, TS 38.104 5.4.2.1, TS 25.101 5.4.4, TS 45.005 2; IEEE 802.11.
    """
    if radio not in RADIOS:
        raise UserError(f"unknown radio '{radio}': expected one of {', '.join(RADIOS)}")
    n = np.asarray(number, dtype=np.float64)
    found = {"lte": _lte, "nr": _nr, "umts": _umts, "gsm": _gsm, "wifi": _wifi}[radio](n)
    return np.where(n == np.floor(n), found, np.nan)


def band_mhz(name: str, radio: str | None = None) -> float:
    """The middle of a band's downlink in MHz: B3, n78, "LTE 1800 (Band 3)", 20; NaN where the band is not known.

    Args:
        name: what the file calls the band; a bare number needs ``radio``.
        radio: lte or nr, where the name does not say which.
    """
    text = name.strip().lower()
    digits = "".join(c if c.isdigit() else " " for c in text.rpartition("band")[2] or text).split()
    if not digits:
        return float("nan")
    number = int(digits[0])
    if text.startswith("n") or radio == "nr":
        low, high = _NR.get(number, (float("nan"), float("nan")))
        return (low + high) / 2
    if text.startswith("b") or "band" in text or radio == "lte":
        for band, low, first, last in _LTE:
            if band == number:
                return low + (last + 1 - first) * 0.1 / 2
    return float("nan")
