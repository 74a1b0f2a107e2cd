import time
from concurrent.futures import ThreadPoolExecutor

from tenfold.files import made_once, replacing


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
