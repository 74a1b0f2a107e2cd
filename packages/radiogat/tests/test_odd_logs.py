"""Files as people have them, beyond the thirteen layouts: separators, signs, units, joined logs, channels of every band."""

import numpy as np
import pytest
from radiogat.channels import band_mhz, channel_mhz, radio_of
from radiogat.cli import main
from radiogat.data import read_samples
from radiogat.planes import unproject
from radiogat.tables import column, numbers, sniff
from radiogat_logs import PLACES, at_places, lonlat, read, written

from tenfold import UserError
from tenfold.testing import assert_user_error

HEAD = "lat,lon,freq_mhz,rsrp"
ROWS = [f"{lat},{lon},1800,{-80 - i}" for i, (lat, lon) in enumerate(PLACES)]


def right(samples, count=4, bands=(1800.0,)):
    at_places(samples, count)
    assert samples.rss_dbm.tolist() == [-80.0 - i for i in range(count)]
    assert samples.bands == bands


# Separators, signs, encodings


@pytest.mark.parametrize("gap", [" ", "   ", "\t \t"])
@pytest.mark.parametrize("mark", ["", "# ", "% ", "#"])
def test_tables_whose_columns_stand_apart_by_spaces(tmp_path, gap, mark):
    lines = [mark + gap.join(HEAD.split(",")), *(gap.join(row.split(",")) for row in ROWS)]
    right(read(written(tmp_path, lines, "matlab.txt")))


def test_prose_is_no_header_where_words_are_columns(tmp_path):
    lines = ["measured lat and lon of a walk", "lat lon freq_mhz rsrp", *(row.replace(",", " ") for row in ROWS)]
    right(read(written(tmp_path, lines, "walk.txt")))


def test_decimal_commas_in_quotes_between_commas(tmp_path):
    """A position of 48,1401 was read as 48 degrees and 1401 minutes."""
    rows = [",".join(f'"{field.replace(".", ",")}"' for field in row.split(",")) for row in ROWS]
    right(read(written(tmp_path, [HEAD, *rows])))


def test_a_decimal_comma_where_most_numbers_have_a_point_is_no_angle(tmp_path):
    rows = [f"{str(lat).replace('.', ',')}\t{lon}\t1800.0\t-80.5" for lat, lon in PLACES]
    with pytest.raises(UserError, match="line 2, column lat: '48,1401' is no number"):
        read_samples(written(tmp_path, [HEAD.replace(",", "\t"), *rows]))


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("48.14", 48.14),
        ("\u221233.5", -33.5),
        ("33.5 S", -33.5),
        ("W 11°30'", -11.5),
        ("48:30:36", 48.51),
        ("48\u00b0 30\u2032 36\u2033 N", 48.51),
        ("11.5 O", None),  # east in German, west in Spanish
        ("48/11", None),
        ("48,1401", None),
        ("48 75", None),
        ("48.5 30", None),
        ("-33.5 N", None),
        ("1.2.3", None),
    ],
)
def test_an_angle_is_read_as_it_is_written_or_not_at_all(text, degrees):
    import pandas

    found, odd = numbers(pandas.Series([text]), comma=False, degrees=True)
    assert odd[0] == (degrees is None)
    assert np.allclose(found, [np.nan if degrees is None else degrees], equal_nan=True)


def test_hemispheres_in_columns_of_their_own_count(tmp_path):
    lines = ["Latitude,N/S,Longitude,E/W,freq_mhz,rsrp", "33.86,S,70.2,W,1800,-80", "33.87,S,70.3,W,1800,-81"]
    assert np.allclose(lonlat(read(written(tmp_path, lines))), [(-70.2, -33.86), (-70.3, -33.87)], atol=1e-9)
    with pytest.raises(UserError, match="line 2, column N/S: is none of N, S, E, W"):
        read_samples(written(tmp_path, [lines[0], lines[1].replace("S", "x"), lines[2]]))


def test_a_typographic_minus_and_marks_of_missing_values_are_known(tmp_path):
    lines = [HEAD, *ROWS[:2], "48.1403,11.5703,1800,\u221282", "48.1404,11.5704,1800,#N/A", "48.1405,11.5705,1800,\\N"]
    right(read(written(tmp_path, lines), "2 of 5 rows are left out", missing="drop"), 3)


def test_a_preamble_with_signs_that_only_some_take_for_ends_of_lines(tmp_path):
    lines = ["Device\u0085 X", "page\x0cbreak", *(f"note {i}" for i in range(10)), HEAD, *ROWS]
    right(read(written(tmp_path, lines, encoding="latin-1")))


def test_a_preamble_that_says_a_position_is_no_header(tmp_path):
    lines = ["Latitude,48.1,Longitude,11.5", "Model,FSH8", "", HEAD, *ROWS]
    right(read(written(tmp_path, lines)))


def test_a_line_of_units_below_the_names_counts(tmp_path):
    rows = [f"{lat};{lon};1.8;{-80 - i}" for i, (lat, lon) in enumerate(PLACES)]
    right(read(written(tmp_path, ["Latitude;Longitude;Frequency;Level", "deg;deg;GHz;dBm", *rows])))
    with pytest.raises(UserError, match=r"column Level is in dbµv, expected dBm"):
        read_samples(written(tmp_path, ["Latitude;Longitude;Frequency;Level", "deg;deg;GHz;dBµV", *rows]))


def test_joined_logs_and_lines_below_the_table(tmp_path):
    """A header once more, a count of rows as databases print it, a block of zero bytes where power was cut."""
    lines = [HEAD, *ROWS[:2], HEAD.upper(), *ROWS[2:], "\0\0\0\0\0"]
    right(read(written(tmp_path, lines)))
    lines = [HEAD, *ROWS, "(4 rows)"]
    with pytest.raises(UserError, match=r"line 6, column lat: a line of text \('\(4 rows\)'\).*--missing drop"):
        read_samples(written(tmp_path, lines))
    right(read(written(tmp_path, lines), "1 of 5 rows are left out", missing="drop"))


def test_the_index_that_pandas_writes_and_empty_columns_are_no_trouble(tmp_path):
    lines = [
        ",lat,lon,,freq_mhz,rsrp,",
        *(f"{i},{','.join(r.split(',')[:2])},,1800,{-80 - i}," for i, r in enumerate(ROWS)),
    ]
    right(read(written(tmp_path, lines)))
    lines = ["time,lat,lon,freq_mhz,rsrp", *(f"2026-03-01 10:00:0{i},{row}" for i, row in enumerate(ROWS))]
    right(read(written(tmp_path, lines)))


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"PK\x03\x04xl/workbook", "a workbook .xlsx, ods. or a zip archive: export the sheet as CSV"),
        (b"\x1f\x8b\x08\x00", "compressed: unpack it first"),
        (b"SQLite format 3\x00", "a database: export its table"),
        (b"\x89HDF\r\n\x1a\n", "HDF5 or netCDF"),
        (b"PAR1\x15\x04", "parquet:FILE"),
        (b"<?xml version='1.0'?><kml>", "XML .KML, GPX."),
        (b'{"type": "FeatureCollection"}', "JSON: export"),
    ],
)
def test_files_that_are_no_text_tables_are_refused_by_their_kind(tmp_path, start, said):
    path = tmp_path / "log.csv"
    path.write_bytes(start + bytes(range(64)))
    with pytest.raises(UserError, match=said):
        read_samples(path)


# Which columns


@pytest.mark.parametrize(
    ("lat", "lon", "freq", "power"),
    [
        ("Latitude (deg)", "Longitude (deg)", "Freq (MHz)", "RSRP (dBm)"),
        ("lat", "lng", "freq_mhz", "ss_rsrp_dbm"),
        ("GPSLatitude", "GPSLongitude", "CarrierFrequency", "SsRsrp"),
        ("LAT", "LONG", "FREQUENCY_MHZ", "Signal Strength [dBm]"),
        ("decimalLatitude", "decimalLongitude", "Frequency [MHz]", "RxPower (dBm)"),
    ],
)
def test_names_of_columns_in_other_spellings(tmp_path, lat, lon, freq, power):
    right(read(written(tmp_path, [f"{lat},{lon},{freq},{power}", *ROWS])))


def test_carrier_to_interference_is_no_cell(tmp_path):
    lines = [HEAD + ",C/I", *(f"{row},{i}" for i, row in enumerate(ROWS))]
    right(read(written(tmp_path, lines)))


def test_of_two_spellings_of_one_name_none_is_taken_unasked(tmp_path):
    lines = [HEAD + ",RSRP (dBm)", *(row + ",-99" for row in ROWS)]
    with pytest.raises(UserError, match=r"rsrp, RSRP \(dBm\): which is meant\? --columns rss_dbm=NAME"):
        read_samples(written(tmp_path, lines))
    right(read(written(tmp_path, lines), columns={"rss_dbm": "rsrp"}))


def test_of_two_positions_in_a_row_it_is_said_which_counts(tmp_path):
    """A tower's and the phone's."""
    lines = ["gps_lat,gps_lon," + HEAD, *(f"48.2,11.6,{row}" for row in ROWS)]
    right(read(written(tmp_path, lines), "positions are lat, lon; gps_lat is there, too: --columns lat=NAME,lon=NAME"))
    assert len(read(written(tmp_path, lines), "medians", columns={"lat": "gps_lat", "lon": "gps_lon"})) == 1


def test_degrees_count_before_an_acceleration_called_x_and_y(tmp_path):
    lines = ["x,y,z," + HEAD, *(f"0.{i},9.8,0.1,{row}" for i, row in enumerate(ROWS))]
    right(read(written(tmp_path, lines)))


def test_degrees_called_x_and_y_are_not_taken_for_meters(tmp_path):
    lines = ["X,Y,freq_mhz,rsrp", *(f"{lon},{lat},1800,{-80 - i}" for i, (lat, lon) in enumerate(PLACES))]
    with pytest.raises(
        UserError, match=r"all measurements would lie within 0.0003 m; if degrees, --columns lon=X,lat=Y"
    ):
        read_samples(written(tmp_path, lines))
    right(read(written(tmp_path, lines), columns={"lon": "X", "lat": "Y"}))
    far = ["X,Y,freq_mhz,rsrp", "11.5,48.1,1800,-80", "12.9,48.9,1800,-81"]
    read(
        written(tmp_path, far), "x and y are taken as meters, 1.4 m across; if they are degrees, --columns lon=X,lat=Y"
    )
    room = ["x,y,freq_mhz,rsrp", "0.1,0.2,1800,-80", "0.4,0.1,1800,-81"]
    assert len(read(written(tmp_path, room))) == 2  # a bench, about its own origin


@pytest.mark.parametrize("unit", ["dBμV", "dBµV/m", "dBmV", "dBFS", "dB", "uW", "asu", "%"])
def test_powers_in_any_other_unit_are_refused(tmp_path, unit):
    with pytest.raises(UserError, match="expected dBm: convert it"):
        read_samples(written(tmp_path, [f"lat,lon,freq_mhz,Level ({unit})", *ROWS]))
    right(read(written(tmp_path, ["lat,lon,freq_mhz,RSRP (dBm/15 kHz)", *ROWS])))
    right(read(written(tmp_path, ["lat,lon,freq_mhz,RSSI (avg)", *ROWS])))


def test_identities_are_the_same_with_and_without_a_decimal_point(tmp_path):
    lines = [HEAD + ",pci", *(f"{row},{pci}" for row, pci in zip(ROWS, ("101.0", "101", "7", "7.0"), strict=True))]
    path = written(tmp_path, lines)
    assert len(read(path, "2 rows are of other cells", by="pci", only=["101"])) == 2


# Values that mark missing ones


def test_a_level_far_from_all_others_that_comes_often_is_said_and_can_be_left_out(tmp_path):
    rows = [*ROWS, *(f"48.15{i},11.58,1800,-140" for i in range(3))]
    path = written(tmp_path, [HEAD, *rows])
    said = (
        "column rsrp: -140 stands 3 times, 57 dB from every other value; if it marks missing ones, --range -111.5,-80"
    )
    assert len(read(path, said)) == 7
    right(read(path, "3 of 7 rows are left out", missing="drop", range=(-111.5, -80.0)))
    with pytest.raises(UserError, match=r"line 6, column rsrp: outside of --range \('-140'\) \(and 2 more rows\)"):
        read_samples(path, range=(-111.5, -80.0))
    one = [*ROWS, *(f"48.15{i},11.58,1800,-1" for i in range(3))]
    read(written(tmp_path, [HEAD, *one]), "-1 stands 3 times, 79 dB from every other value")


@pytest.mark.filterwarnings("default::UserWarning")  # said, not raised
def test_options_with_a_minus_in_front_are_taken(tmp_path, capsys):
    rows = ["Frequency (MHz);Amplitude (dBm)", "868;-60", "868.1;-61", "868.2;-150"]
    words = ["convert", "--data", f"csv:{written(tmp_path, rows)}", "--to", "csv", "--missing", "drop"]
    words += ["--at", "-33.86,151.2", "--range", "-120,-20", "--out", str(tmp_path / "o")]
    assert main(words) == 0
    assert "1 of 3 rows are left out" in capsys.readouterr().err
    samples = read_samples(tmp_path / "o/samples.csv")
    assert np.allclose(unproject(samples.xy, samples.crs), [(151.2, -33.86)] * 2)
    assert_user_error(main, [*words, "--range", "-20,-120"], capsys, "--range: expected LOW,HIGH")


def test_positions_out_of_range_among_good_ones_are_faults_of_their_rows(tmp_path):
    lines = [HEAD, *ROWS, "99.99,11.57,1800,-85", "48.1,999,1800,-85"]
    right(read(written(tmp_path, lines), "2 of 6 rows are left out", missing="drop"))


# Frequencies


def test_frequencies_that_say_their_unit_themselves(tmp_path):
    rows = [
        row.replace(",1800,", f",{unit},")
        for row, unit in zip(ROWS, ("1.8 GHz", "1800 MHz", "1800000 kHz", "1800"), strict=True)
    ]
    right(read(written(tmp_path, ["lat,lon,freq,rsrp", *rows])))


def test_ranges_that_may_be_two_units_are_said(tmp_path):
    fm = [row.replace(",1800,", f",{98500 + 100 * i},") for i, row in enumerate(ROWS)]
    path = written(tmp_path, ["lat,lon,freq,rsrp", *fm])
    read(path, "column freq is read as MHz, up to 98800; if it is kHz, say so in its name")
    khz = read(written(tmp_path, ["lat,lon,freq (kHz),rsrp", *fm]))
    assert np.allclose(khz.bands, (98.5, 98.6, 98.7, 98.8))
    mmw = written(tmp_path, ["lat,lon,freq,rsrp", *(row.replace(",1800,", ",28,") for row in ROWS)])
    read(mmw, "read as MHz, up to 28; if it is GHz")


def test_a_unit_that_changes_within_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("radiogat.tables._ROWS", 2)
    rows = [row.replace(",1800,", f",{f},") for row, f in zip(ROWS, (1.8, 1.8, 1800, 1800), strict=True)]
    with pytest.raises(UserError, match="column freq is 1800 in one part and looks like GHz in another"):
        read_samples(written(tmp_path, ["lat,lon,freq,rsrp", *rows]))


def test_channels_stand_in_where_a_frequency_is_missing(tmp_path):
    lines = [
        "lat,lon,freq_mhz,earfcn,rsrp",
        *(f"{lat},{lon},{'1815' if i % 2 else '0'},1300,{-80 - i}" for i, (lat, lon) in enumerate(PLACES)),
    ]
    right(read(written(tmp_path, lines)), bands=(1815.0,))


def test_a_given_frequency_counts_before_a_column_and_it_is_said(tmp_path):
    right(read(written(tmp_path, [HEAD, *ROWS]), "column freq_mhz is not read", freq_mhz=868.0), bands=(868.0,))


def test_umts_channels_have_the_offsets_of_their_bands():
    """TS 25.101: 2937 is band VIII at 927.4 MHz (it was read as 587.4)."""
    cases = [
        (10562, 2112.4),
        (9662, 1932.4),
        (412, 1932.5),
        (687, 1987.5),
        (1162, 1807.4),
        (1537, 2112.4),
        (2087, 2152.5),
    ]
    cases += [
        (4357, 871.4),
        (1007, 871.5),
        (2237, 2622.4),
        (2912, 2687.5),
        (2937, 927.4),
        (3088, 957.6),
        (3112, 2112.4),
    ]
    cases += [(3712, 1478.4), (3842, 731.4), (4017, 748.4), (712, 877.4), (4512, 793.4), (862, 1498.4), (4662, 3512.4)]
    cases += [(5112, 1932.4), (5762, 861.4), (413, np.nan), (9, np.nan), (10839, np.nan), (16000, np.nan)]
    found = channel_mhz([n for n, _ in cases], "umts")
    assert np.allclose(found, [f for _, f in cases], atol=1e-9, equal_nan=True)


def test_numbers_of_another_radio_are_no_channels():
    """An EARFCN among NR-ARFCN gave 6.5 MHz; phones write 0 for unknown; 6 GHz Wi-Fi has numbers that 5 GHz has not."""
    assert np.isnan(channel_mhz([0, 1300, 6300, 75000, 900000, 2147483647], "nr")).all()
    assert np.isnan(channel_mhz([0, 19300, 131400, 2147483647, -1], "lte")).all()
    assert np.isnan(channel_mhz([37, 45, 146, 184, 233], "wifi")).all()
    assert np.allclose(channel_mhz([149, 165, 177], "wifi"), [5745, 5825, 5885])
    # FR2: n258, n261 and n260
    assert np.allclose(channel_mhz([2016667, 2077083, 2254166], "nr"), [24250.08, 27875.04, 38500.02])
    # odd bands of LTE: 23, 49, 53, 54, 71, 103
    assert np.allclose(
        channel_mhz([7500, 56740, 60140, 60255, 68586, 70646], "lte"), [2180, 3550, 2483.5, 1670, 617, 757]
    )
    assert np.allclose(channel_mhz([955, 259, 306], "gsm"), [921.2, 460.6, 489.0])
    assert np.allclose(channel_mhz([512, 810], "pcs"), [1930.2, 1989.8])
    assert np.isnan(channel_mhz(811, "pcs"))


def test_gsm_channels_of_two_bands_are_said_and_can_be_chosen(tmp_path):
    lines = ["lat,lon,arfcn,rxlev", *(row.replace(",1800,", ",600,") for row in ROWS)]
    path = written(tmp_path, lines)
    right(read(path, "read as DCS 1800; in the Americas they are PCS 1900 (--radio pcs)", radio="gsm"), bands=(1822.8,))
    right(read(path, radio="pcs"), bands=(1947.8,))


@pytest.mark.parametrize(
    ("name", "radio", "mhz"),
    [
        ("n78", None, 3550),
        ("N78", None, 3550),
        ("NR n78", None, 3550),
        ("5G n78", "nr", 3550),
        ("NR5G BAND 78", None, 3550),
        ("n258", None, 25875),
        ("78", "nr", 3550),
        ("4G B3", "lte", 1842.5),
        ("LTE BAND 20", None, 806),
        ("B3 (1800)", None, 1842.5),
        ("E-UTRA Band 3", None, 1842.5),
        ("B8", "nr", 942.5),
        ("20", "lte", 806),
        ("8", "umts", 942.5),
        ("B3+B7", None, None),
        ("B3/n78", None, None),
        ("L1800", "lte", None),
        ("1800", "lte", None),
        ("5G", "nr", None),
        ("900", "gsm", None),
        ("3", None, None),
    ],
)
def test_a_band_is_what_its_name_says_or_unknown(name, radio, mhz):
    """With 4G in front of it B3 was band 4, and 5G n78 was n5."""
    found = band_mhz(name, radio)
    assert np.isnan(found) if mhz is None else found == mhz


def test_a_band_number_is_of_the_radio_of_its_own_row(tmp_path):
    rows = [
        f"{lat},{lon},{tech},{band},-80"
        for (lat, lon), tech, band in zip(PLACES, ("LTE", "NR5G-SA"), (3, 78), strict=False)
    ]
    assert read(written(tmp_path, ["lat,lon,tech,band,rsrp", *rows]), "middle").bands == (1842.5, 3550.0)
    assert radio_of("EUTRAN") == "lte"


def test_hackrfs_sweeps_are_read_as_those_of_rtl_power(tmp_path):
    rows = [
        f"2026-03-01, 10:00:0{i}.25, 868000000, 868200000, 100000.00, 50, -40.1, {'-' if i else -50}" for i in range(2)
    ]
    path = written(tmp_path, rows)
    assert len(read(path, "relative to", at=PLACES[0])) == 3 - 1  # two lines at one place: medians
    assert column("Level", "dBm").unit == "dbm"
    assert sniff(path, lambda fields: False).delimiter == ","


def test_a_column_that_says_several_frequencies_is_asked_about(tmp_path):
    """It was left out in silence."""
    lines = ["time,lat,lon,RSSI 1842.5 MHz (20 MHz),RSSI 806 MHz", "1,48.14,11.57,-80,-90", "2,48.15,11.57,-81,-91"]
    with pytest.raises(UserError, match="says several frequencies: rename it"):
        read_samples(written(tmp_path, lines))


def test_powers_above_zero_and_those_of_nr_beside_lte_are_said(tmp_path):
    lines = ["lat,lon,earfcn,rsrp,nr_arfcn,ss_rsrp", "48.1,11.5,1300,-80,636666,-95", "48.2,11.5,1300,20,636666,-96"]
    samples = read(written(tmp_path, lines), "1 powers are above 0 dBm, up to 20", "column ss_rsrp is not read")
    assert samples.bands == (1815.0,)
    of_nr = read(written(tmp_path, lines), columns={"rss_dbm": "ss_rsrp", "channel": "nr_arfcn"})
    assert of_nr.rss_dbm.tolist() == [-95, -96]


def test_a_long_block_of_zero_bytes_and_a_long_preamble_are_passed(tmp_path):
    path = tmp_path / "log.csv"
    notes = "".join(f"# note {i}\n" for i in range(300))
    path.write_bytes(
        (notes + "\n".join([HEAD, *ROWS[:3]]) + "\n").encode() + b"\0" * 300_000 + f"\n{ROWS[3]}\n".encode()
    )
    right(read(path))
