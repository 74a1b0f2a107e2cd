"""Files as tools write them: thirteen layouts made by hand after their published headers, and what is said about each."""

import tracemalloc

import numpy as np
import pytest
from radiogat.channels import band_mhz, channel_mhz, radio_of
from radiogat.cli import main
from radiogat.data import read_points, read_samples
from radiogat.planes import unproject
from radiogat.tables import column, encoding_of, numbers
from radiogat_logs import PLACES, at_places, lonlat, read, written

from tenfold import UserError
from tenfold.testing import assert_user_error

# Thirteen tools


def g_nettrack(tmp_path, cells=(101, 101, 101, 101)):
    head = (
        "Timestamp\tLongitude\tLatitude\tSpeed\tOperatorname\tOperator\tCGI\tCellname\tNode\tCellID\tLAC\tNetworkTech"
    )
    head += "\tNetworkMode\tLevel\tQual\tSNR\tCQI\tLTERSSI\tARFCN\tDL_bitrate\tUL_bitrate\tPSC\tAltitude\tAccuracy"
    rows = [
        f"2026.03.01_10.00.0{i}\t{lon}\t{lat}\t12\tOp\t26201\t26201-1\t-\t77\t{900 + cells[i]}\t5\t4G\tLTE\t{-80 - i}\t-9"
        f"\t12\t-\t-60\t1300\t100\t20\t{cells[i]}\t520\t4"
        for i, (lat, lon) in enumerate(PLACES)
    ]
    return written(tmp_path, [head, *rows], "gnettrack.txt")


def test_g_nettrack(tmp_path):
    samples = read(g_nettrack(tmp_path))
    at_places(samples)
    assert samples.rss_dbm.tolist() == [-80, -81, -82, -83]
    assert samples.bands == (1815.0,)  # EARFCN 1300


def test_netmonster(tmp_path):
    head = "Date;Time;Technology;MCC;MNC;TAC;eCI;PCI;EARFCN;Band;RSRP;RSRQ;SNR;Latitude;Longitude;Accuracy"
    rows = [
        f"2026-03-01;10:00:0{i};LTE;262;1;5;77;101;6300;20;{-90 - i};-11;5;{lat};{lon};5"
        for i, (lat, lon) in enumerate(PLACES)
    ]
    samples = read(written(tmp_path, [head, *rows], encoding="utf-8-sig", end="\r\n"))
    at_places(samples)
    assert samples.bands == (806.0,)


def test_tems_with_several_scanned_channels_in_a_row(tmp_path):
    head = "Time\tMS\tFrame Number\tDirection\tMessage Type\tEvent\tEventInfo\tAll-Latitude Decimal Degree (Text)"
    head += "\tAll-Longitude Decimal Degree (Text)\tAll-Scanned ARFCN[0]\tAll-Scanned RxLev (dBm)[0]"
    head += "\tAll-Scanned ARFCN[1]\tAll-Scanned RxLev (dBm)[1]"
    rows = [
        f"10:00:0{i}\tMS1\t\t\t\t\t\t{lat}\t{lon}\t10\t{-70 - i}\t600\t{-75 - i}" for i, (lat, lon) in enumerate(PLACES)
    ]
    rows[3] = rows[3].rsplit("\t", 2)[0] + "\t\t"  # the second channel was not heard
    samples = read(written(tmp_path, [head, *rows], "tems.fmt"), "read as DCS 1800")
    assert samples.bands == (937.0, 1822.8)
    assert sorted(samples.rss_dbm.tolist()) == [-77, -76, -75, -73, -72, -71, -70]


def test_qualipoc_with_decimal_commas_and_utf_16(tmp_path):
    head = "Time;Latitude;Longitude;LTE Serving Cell EARFCN DL;LTE Serving Cell PCI;LTE Serving Cell RSRP [dBm]"
    rows = [
        f"01.03.2026 10:00:0{i};{str(lat).replace('.', ',')};{str(lon).replace('.', ',')};3350;7;-8{i},5"
        for i, (lat, lon) in enumerate(PLACES)
    ]
    samples = read(written(tmp_path, [head, *rows], encoding="utf-16", end="\r\n"))
    at_places(samples)
    assert samples.rss_dbm.tolist() == [-80.5, -81.5, -82.5, -83.5]
    assert samples.bands == (2680.0,)


def test_nemo_with_a_preamble_and_the_system_beside_the_channel(tmp_path):
    lines = ["Nemo Analyze export", "Measurement file: drive.nmf", ""]
    lines += ["Time,Longitude,Latitude,System,Channel number,Physical cell identity,RSRP (dBm)"]
    lines += [
        f"10:00:0{i}.000,{lon},{lat},{'LTE FDD' if i < 2 else 'NR'},{1300 if i < 2 else 636666},5,{-90 - i}"
        for i, (lat, lon) in enumerate(PLACES)
    ]
    samples = read(written(tmp_path, lines))
    at_places(samples)
    assert samples.freq_mhz.round(2).tolist() == [1815, 1815, 3549.99, 3549.99]


def test_nemos_events_with_values_of_the_serving_cell_and_of_detected_ones(tmp_path):
    """The header of public scripts over Nemo's CSV: values of the serving cell in brackets, ``n/a`` between them."""
    head = "Time,Longitude,Latitude,Velocity,EARFCN (LTE pcell),Physical cell identity (LTE pcell),RSRP (LTE pcell)"
    head += ",RSRQ (LTE pcell),Pathloss (LTE pcell),RSRP (LTE detected) - 1,Physical cell identity (LTE detected) - 1"
    rows = []
    for i, (lat, lon) in enumerate(PLACES):
        rows.append(f"10:00:0{i}.000,{lon},{lat},12,1300,5,{-90 - i},-9,110,-99,7")
        rows.append(f"10:00:0{i}.500,{lon},{lat}, n/a, n/a, n/a, n/a, n/a, n/a, n/a, n/a")
    path = written(tmp_path, [head, *rows])
    with pytest.raises(UserError, match=r"line 3, column RSRP \(LTE pcell\): is empty.*--missing drop"):
        read_samples(path)
    samples = read(path, "4 of 8 rows are left out", missing="drop")
    at_places(samples)
    assert samples.rss_dbm.tolist() == [-90, -91, -92, -93]
    assert samples.bands == (1815.0,)


def test_qualipocs_summary_with_columns_twice_and_marks_of_no_width(tmp_path):
    """The order of columns of public scripts over QualiPoc's CSV, where PCI, EARFCN and RSRP come again further on."""
    head = "Time,Network,Operator,Technology,Data technology,Cell Id,DL EARFCN,RSSI,PCI,RSRP,RSRQ,Longitude,Latitude"
    head += ",\u200bRSRP\u200b,RSRQ,RSSI,SINR Rx[0],SINR Rx[1],RSRP Rx[0],RSRP Rx[1],PCI,DL EARFCN,Bandwidth"
    rows = [
        f"2018-01-06 08:55:3{i},Op,26201,LTE,LTE,77,1300,-60,101,{-80 - i},-9,{lon},{lat},{-80 - i},-9,-60,20,21,-80,-81"
        ",101,1300,20"
        for i, (lat, lon) in enumerate(PLACES)
    ]
    path = written(tmp_path, [head, *rows])
    with pytest.raises(UserError, match=r"'DL EARFCN' \(#7 and #22\).*--columns channel=#7,rss_dbm=#10,cell=#9"):
        read_samples(path)
    samples = read(path, columns={"channel": "#7", "rss_dbm": "#10", "cell": "#9"})
    at_places(samples)
    assert samples.rss_dbm.tolist() == [-80, -81, -82, -83]


def test_netmonsters_list_of_cells_is_no_log(tmp_path):
    rows = [f"4G;262;1;{i};132;4127;350;{lat};{lon};Street 1;1300" for i, (lat, lon) in enumerate(PLACES)]
    with pytest.raises(UserError, match=r"NetMonster's list of cells \(.ntm\) holds no powers"):
        read_samples(written(tmp_path, rows, "cells.ntm"))


def test_opencellids_measurements(tmp_path):
    head = "mcc,net,area,cell,lon,lat,signal,measured,created,rating,speed,direction,radio,ta,rnc,cid,psc,tac,pci"
    rows = [f"262,1,5,77,{lon},{lat},{-70 - i},170{i},170{i},5,,,GSM,,,,,," for i, (lat, lon) in enumerate(PLACES)]
    path = written(tmp_path, [head, *rows])
    with pytest.raises(UserError, match="no column of frequencies.*--freq_mhz"):
        read_samples(path)
    at_places(read(path, freq_mhz=947.4))


def test_mozillas_cells_without_a_header(tmp_path):
    rows = [
        f"LTE,262,1,5,{70 + i},{i},{lon},{lat},100,9,1,1500000000,1500000000,{-90 - i}"
        for i, (lat, lon) in enumerate(PLACES)
    ]
    path = written(tmp_path, rows)
    with pytest.raises(UserError, match="--freq_mhz"):
        read_samples(path)
    at_places(read(path, "4 cells by cell", "--by cell --only 70 maps one cell", freq_mhz=1815.0))


def test_sigcap(tmp_path):
    head = "sigcap_version,timestamp,latitude,longitude,operator,lte_count,lte_primary_pci,lte_primary_ci,lte_primary_earfcn"
    head += ",lte_primary_band*,lte_primary_freq_mhz*,lte_primary_width_mhz,lte_primary_rsrp_dbm,lte_primary_rsrq_db"
    rows = [
        f"1.2,2026-03-01T10:00:0{i}.000-0500,{lat},{lon},Op,3,101,9,{'1300,3,1815.0' if i else 'NaN,N/A,NaN'},20,"
        f"{-95 - i if i else 'NaN'},-12"
        for i, (lat, lon) in enumerate(PLACES)
    ]
    path = written(tmp_path, [head, *rows])
    with pytest.raises(UserError, match=r"line 2, column lte_primary_rsrp_dbm: is empty.*--missing drop"):
        read_samples(path)
    samples = read(path, "1 of 4 rows are left out", missing="drop")
    assert samples.rss_dbm.tolist() == [-96, -97, -98]
    assert samples.bands == (1815.0,)


def sweeps(tmp_path):
    rows = [
        f"2026-03-01, 10:00:0{i}, 868000000, 868400000, 100000.00, 50, {-40 - i}.1, -50.2, -60.3, -70.4"
        for i in range(4)
    ]
    return written(tmp_path, rows, "rtl.csv")


def test_rtl_power_with_the_track_that_a_gps_wrote(tmp_path):
    path = sweeps(tmp_path)
    with pytest.raises(UserError, match="have no positions: --track FILE.*--at LAT,LON"):
        read_samples(path)
    track = [f"2026-03-01T10:00:0{i}Z,{lat},{lon}" for i, (lat, lon) in enumerate(PLACES)]
    track = written(tmp_path, ["time,lat,lon", *track], "track.csv")
    samples = read(path, "relative to the receiver's full scale", track=track)
    assert samples.bands == (868.0, 868.1, 868.2, 868.3)
    at_places(samples.band(868.0))
    assert read(path, "relative", track=track, freq_mhz=868.2).rss_dbm.tolist() == [-60.3] * 4
    late = written(tmp_path, ["time,lat,lon", "2026-03-01T11:00:00Z,48,11"], "late.csv")
    with pytest.raises(UserError, match="no position in the track within 5 seconds"):
        read_samples(path, track=late)


def test_wigle_with_its_preamble_and_both_radios(tmp_path):
    lines = [
        "WigleWifi-1.6,appRelease=2.9,model=P,release=14,device=p,display=d,board=b,brand=B,star=Sol,body=3,subBody=0"
    ]
    lines += [
        "MAC,SSID,AuthMode,FirstSeen,Channel,Frequency,RSSI,CurrentLatitude,CurrentLongitude,AltitudeMeters"
        ",AccuracyMeters,RCOIs,MfgrId,Type"
    ]
    lines += [
        f'a0:00:00:00:00:01,"\u00fcber, #1",[ESS],2026-03-01 10:00:0{i},6,2437,{-50 - i},{lat},{lon},520,4,,,WIFI'
        for i, (lat, lon) in enumerate(PLACES[:3])
    ]
    lines += [f"a0:00:00:00:00:02,phone,,2026-03-01 10:00:03,,,-60,{PLACES[3][0]},{PLACES[3][1]},520,4,,,BT"]
    path = written(tmp_path, lines)
    with pytest.raises(UserError, match=r"line 6, column Frequency: is empty"):
        read_samples(path)
    samples = read(path, "1 of 4 rows are left out", missing="drop")
    at_places(samples, 3)
    assert samples.bands == (2437.0,)


def test_g_mon(tmp_path):
    lines = ["BSSID;LAT;LON;SSID;Crypt;Beacon Interval;Connection Mode;Channel;RXL;Date;Time"]
    lines += [
        f"00:12:17:46:61:29;{lat};{lon};net;Open;AAA;Infra;{11 if i else 36};{-70 - i};2026/03/01;10:00:0{i}"
        for i, (lat, lon) in enumerate(PLACES)
    ]
    samples = read(written(tmp_path, lines, encoding="latin-1"))
    at_places(samples)
    assert samples.bands == (2462.0, 5180.0)


def test_cellmapper_without_a_header(tmp_path):
    lines = [f"{lat},{lon},520,262,1,5,77,{-100 - i},LTE,LTE,1300,101" for i, (lat, lon) in enumerate(PLACES)]
    samples = read(written(tmp_path, lines))
    at_places(samples)
    assert samples.bands == (1815.0,)


def test_a_spectrum_analyzers_sweep_with_its_preamble(tmp_path):
    lines = ["! FILETYPE CSV", "! TIMESTAMP 2026-03-01 10:00:00 UTC", "Frequency (Hz);Amplitude (dBm)"]
    lines += [f"{(868 + i / 10) * 1e6:.0f};{-60 - i},25" for i in range(4)]
    path = written(tmp_path, lines)
    with pytest.raises(UserError, match="--at LAT,LON gives the one place of all"):
        read_samples(path)
    samples = read(path, at=PLACES[0])
    assert np.allclose(samples.bands, [868.0, 868.1, 868.2, 868.3])
    assert samples.rss_dbm.tolist() == [-60.25, -61.25, -62.25, -63.25]


def test_a_column_for_each_frequency(tmp_path):
    lines = ["Time,Latitude,Longitude,1842.5 MHz,2.65 GHz"]
    lines += [f"10:00:0{i},{lat},{lon},{-60 - i},{-70 - i}" for i, (lat, lon) in enumerate(PLACES)]
    samples = read(written(tmp_path, lines))
    assert samples.bands == (1842.5, 2650.0)
    assert len(samples) == 8


# What is said about values


def test_all_faults_of_a_file_come_in_one_message(tmp_path):
    lines = [
        "lat,lon,freq_mhz,rsrp",
        "48.1,11.5,1800,-80",
        "48.2,,1800,-80",
        "0,0,1800,-80",
        "48.3,11.6,,-80",
        "48.4,11.6,1800,",
    ]
    lines += ["48.4,11.7,1800,2147483647", "48.4,11.8,1800,-81"]
    path = written(tmp_path, lines)
    with pytest.raises(UserError) as error:
        read_samples(path)
    for said in (
        "line 3, column lon: is empty",
        "line 4, column lon, lat: no position (0, 0 or out of range)",
        "line 5, column freq_mhz: is empty",
        "line 6, column rsrp: is empty",
        "line 7, column rsrp: 0 dBm or out of range, which marks missing values ('2.14748e+09')",
        "--missing drop leaves such rows out",
    ):
        assert said in str(error.value)
    assert len(read(path, "5 of 7 rows are left out", missing="drop")) == 2
    lines[1] = "48.1,11.5,1800,low"
    with pytest.raises(UserError, match="line 2, column rsrp: 'low' is no number"):
        read_samples(written(tmp_path, lines), missing="drop")


def test_several_cells_never_become_one_median(tmp_path):
    lines = ["lat,lon,earfcn,pci,rsrp"]
    lines += [
        f"{lat},{lon},1300,{pci},{level - i}"
        for i, (lat, lon) in enumerate(PLACES)
        for pci, level in ((7, -80), (9, -110))
    ]
    lines += [f"{PLACES[0][0]},{PLACES[0][1]},1300,7,-84"]  # measured twice
    path = written(tmp_path, lines)
    samples = read(
        path, "2 cells by pci, 7 (5), 9 (4)", "the strongest counts, 4 values of 9 rows", "--by pci --only 7"
    )
    assert samples.rss_dbm.tolist() == [-82, -81, -82, -83]
    one = read(path, "5 rows are of other cells than 9", by="pci", only=["9"])
    assert one.rss_dbm.tolist() == [-110, -111, -112, -113]
    with pytest.raises(UserError, match="no row has 8 in column pci; there are 7, 9"):
        read_samples(path, by="pci", only=["8"])
    broken = written(tmp_path, [*lines, f"{PLACES[0][0]},{PLACES[0][1]},1300,7,"], "broken.csv")
    assert len(read(broken, "6 rows are of other cells", by="pci", only=["9"])) == 4  # another cell's fault is none
    with pytest.raises(UserError, match="no column 'pcj': did you mean pci"):
        read_samples(path, by="pcj")
    with pytest.raises(UserError, match="--only takes values of the column that --by names"):
        read_samples(path, only=["7"])


@pytest.mark.filterwarnings("default::UserWarning")  # said, not raised
def test_the_commands_take_the_same_options(tmp_path, capsys):
    log = g_nettrack(tmp_path, (101, 101, 205, 205))
    words = ["convert", "--data", f"csv:{log}", "--to", "csv"]
    assert main([*words, "--out", str(tmp_path / "both")]) == 0
    assert "2 cells by PSC, 101 (2), 205 (2)" in capsys.readouterr().err
    assert main([*words, "--by", "PSC", "--only", "205", "--out", str(tmp_path / "one")]) == 0
    assert read(tmp_path / "one/samples.csv").rss_dbm.tolist() == [-82, -83]
    assert_user_error(
        main, [*words, "--only", "205", "--out", str(tmp_path / "no")], capsys, "--only: expected with --by"
    )
    sweep = [
        "convert",
        "--data",
        f"csv:{sweeps(tmp_path)}",
        "--at",
        "48.1,11.5",
        "--to",
        "csv",
        "--out",
        str(tmp_path / "s"),
    ]
    assert main(sweep) == 0


def test_columns_that_occur_twice_are_refused_together_and_taken_by_their_numbers(tmp_path):
    path = written(tmp_path, ["x,y,freq_mhz,rsrp,rsrp,pci,pci", "0,0,1800,-80,-81,7,9", "9,0,1800,-82,-83,7,9"])
    said = r"2 columns are called 'rsrp' \(#4 and #5\), 2 columns are called 'pci'.*--columns rss_dbm=#4,cell=#6"
    with pytest.raises(UserError, match=said):
        read_samples(path)
    assert read(path, columns={"rss_dbm": "#5", "cell": "#7"}).rss_dbm.tolist() == [-81, -83]
    with pytest.raises(UserError, match="no column #8; there are 7"):
        read_samples(path, columns={"rss_dbm": "#8", "cell": "#6"})
    one = written(tmp_path, ["x,y,freq_mhz,a,a", "0,0,1800,-80,-81"])
    with pytest.raises(UserError, match="2 columns are called 'a': take one by its number, --columns rss_dbm=#4"):
        read_samples(one, columns={"rss_dbm": "a"})


def test_values_of_several_cells_in_one_row_are_asked_for_unless_one_serves(tmp_path):
    head = "x,y,EARFCN (LTE {0}),RSRP (LTE {0}),EARFCN (LTE {1}),RSRP (LTE {1})"
    rows = ["0,0,1300,-80,6300,-90", "9,0,1300,-81,6300,-91"]
    serving = written(tmp_path, [head.format("scell", "pcell"), *rows])
    assert read(serving).rss_dbm.tolist() == [-90, -91]
    assert read(serving).bands == (806.0,)
    unclear = written(tmp_path, [head.format("scell 1", "scell 2"), *rows])
    with pytest.raises(
        UserError, match=r"EARFCN \(LTE scell 1\), EARFCN \(LTE scell 2\): which is meant\?|RSRP.*which"
    ):
        read_samples(unclear)
    named = {"rss_dbm": "RSRP (LTE scell 2)", "channel": "EARFCN (LTE scell 2)"}
    assert read(unclear, columns=named).rss_dbm.tolist() == [-90, -91]


def test_degree_strings_are_read(tmp_path):
    lines = [
        "Latitude;Longitude;freq_mhz;rsrp",
        "48\u00b008'24.36\"N;11\u00b034'12.36\"E;1800;-80",
        "N 48.1402;11 34.212 E;1800;-81 dBm",
    ]
    samples = read(written(tmp_path, lines))
    assert np.allclose(lonlat(samples), [(11.5701, 48.1401), (11.5702, 48.1402)], atol=1e-7)
    west = written(tmp_path, ["lat,lon", "48 0 36 S,011 30 00 W", "47.9 S,11.4 W"])
    assert np.allclose(
        unproject(read_points(west, "EPSG:32729"), "EPSG:32729"), [(-11.5, -48.01), (-11.4, -47.9)], atol=1e-7
    )


@pytest.mark.parametrize(("value", "name"), [(1.8, "GHz"), (1800000, "kHz"), (1800000000, "Hz")])
def test_other_units_of_frequency_are_recognized_by_their_range_and_said(tmp_path, value, name):
    path = written(tmp_path, ["x,y,freq,rsrp", f"0,0,{value},-80", f"9,0,{value},-81"])
    assert read(path, f"column freq is read as {name}").bands == (1800.0,)
    with pytest.raises(UserError, match="give MHz"):
        read_samples(written(tmp_path, ["x,y,freq_mhz,rsrp", f"0,0,{value},-80"]))


def test_bands_become_frequencies_and_it_is_said(tmp_path):
    path = written(tmp_path, ["x,y,band,rsrp", "0,0,B3,-80", "9,0,n78,-81"])
    assert read(path, "the middle of each one's downlink").bands == (1842.5, 3550.0)
    bare = written(tmp_path, ["x,y,band,rsrp", "0,0,3,-80", "9,0,20,-81"])
    with pytest.raises(UserError, match="for bare numbers give --radio lte or nr"):
        read_samples(bare)
    assert read(bare, "middle", radio="lte").bands == (806.0, 1842.5)


def test_channels_of_an_unknown_radio_are_asked_for(tmp_path):
    path = written(tmp_path, ["x,y,channel,rsrp", "0,0,1300,-80", "9,0,1300,-81"])
    with pytest.raises(UserError, match=r"channels of an unknown radio: give --radio lte \| nr"):
        read_samples(path)
    assert read(path, radio="lte").bands == (1815.0,)
    with pytest.raises(UserError, match="is no channel"):
        read_samples(path, radio="gsm")


def test_powers_in_another_unit_are_refused(tmp_path):
    with pytest.raises(UserError, match="column Level .dBuV. is in dbuv, expected dBm"):
        read_samples(written(tmp_path, ["x,y,freq_mhz,Level (dBuV)", "0,0,1800,30"]))


def test_channel_numbers_are_those_of_the_standards():
    """Against numbers worked out by hand from the tables of 3GPP."""
    cases = {
        "lte": [
            (0, np.nan),
            (600, 1930),
            (1300, 1815),
            (3350, 2680),
            (6300, 806),
            (9485, 785.5),
            (38000, 2595),
            (43590, 3600),
            (4999, np.nan),
        ],
        "nr": [(151600, 758), (620000, 3300), (653333, 3799.995), (2016667, 24250.08), (2070833, 27500.04)],
        "umts": [(10562, 2112.4), (2937, 927.4), (9, np.nan)],
        "gsm": [(0, 935), (124, 959.8), (975, 925.2), (512, 1805.2), (885, 1879.8), (128, 869.2), (300, np.nan)],
        "wifi": [(1, 2412), (13, 2472), (14, 2484), (36, 5180), (165, 5825), (20, np.nan)],
    }
    for radio, pairs in cases.items():
        found = channel_mhz([n for n, _ in pairs], radio)
        assert np.allclose(found, [f for _, f in pairs], atol=1e-9, equal_nan=True), radio
    assert np.isnan(channel_mhz(1300.5, "lte"))
    assert band_mhz("LTE 1800 (Band 3)") == 1842.5
    assert np.isnan(band_mhz("B99"))
    assert radio_of("LTE FDD") == "lte"
    assert radio_of("Bluetooth") is None


def test_names_of_columns_are_taken_apart():
    c = column("Serving Cell RSRP (dBm)[1]")
    assert (c.plain, c.unit, c.index) == ("serving_cell_rsrp", "dbm", 1)
    assert column("freq_khz").unit == "khz"


def test_numbers_keep_what_is_missing_apart_from_what_is_wrong():
    import pandas

    found, odd = numbers(pandas.Series(["1,5", "", "-", "n/a", "low", "-80,5 dBm"]), comma=True)
    assert np.array_equal(found, [1.5, np.nan, np.nan, np.nan, np.nan, -80.5], equal_nan=True)
    assert odd.tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_every_encoding_gives_the_same_measurements(tmp_path, encoding):
    lines = ["lat,lon,freq_mhz,rsrp,Stra\u00dfe", *(f"{lat},{lon},1800,-80,\u00fcber" for lat, lon in PLACES)]
    path = written(tmp_path, lines, encoding=encoding)
    at_places(read(path))
    assert encoding_of(path) in {encoding, "utf-8"}


@pytest.mark.parametrize("n", [30_000, pytest.param(400_000, marks=pytest.mark.slow)])
def test_a_table_takes_at_most_three_times_its_file(tmp_path, n):
    rng = np.random.default_rng(0)
    table = np.stack(
        [48 + rng.random(n) / 50, 11 + rng.random(n) / 50, np.resize([1800.5, 2600.5], n), -90 + 9 * rng.random(n)],
        axis=1,
    )
    path = tmp_path / "big.csv"
    np.savetxt(path, table, fmt="%.12f", delimiter=",", header="lat,lon,freq_mhz,rsrp", comments="")
    read_samples(
        written(tmp_path, ["lat,lon,freq_mhz,rsrp", "48.1,11.5,1800,-80"])
    )  # what is imported is no memory of the file
    tracemalloc.start()
    samples = read_samples(path, crs="EPSG:32632")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(samples) == n
    assert peak < 3 * path.stat().st_size
