import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tenfold.files import Lock, made_once, replacing


def test_a_file_that_several_need_is_made_by_one_of_them(tmp_path):
    file, made = tmp_path / "new" / "world.txt", []

    def make():
        made.append(1)
        time.sleep(0.2)
        with replacing(file) as temporary:
            temporary.write_text("whole")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: made_once(file, make), range(3)))
    assert made == [1]
    assert file.read_text() == "whole"


def test_threads_that_ask_at_once_get_a_lock_one_at_a_time(tmp_path):
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of taking the lock
    try:
        with ThreadPoolExecutor(8) as pool:
            for number in range(50):
                locks = [Lock(tmp_path / f"{number}.lock") for _ in range(8)]
                start = threading.Barrier(8)
                taken = list(pool.map(lambda lock, start=start: start.wait() >= 0 and lock.acquire(), locks))
                assert taken.count(True) == 1
                locks[taken.index(True)].release()
    finally:
        sys.setswitchinterval(switching)
