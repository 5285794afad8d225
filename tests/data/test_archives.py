import io
import tarfile
import zipfile

import pytest

from mmm4rec_cli.data.archives import folder_of, unpack
from mmm4rec_cli.errors import DataError


def zip_of(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in members:
            archive.writestr(info, content)
    return path


def tar_of(path, *members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    return path


def link_info(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def test_zip_and_tar_come_out_whole(tmp_path):
    one = zip_of(tmp_path / "a.zip", ("x/", ""), ("x/y.txt", "yes"), ("z", "no"))
    two = tar_of(tmp_path / "b.tar.gz", ("x", b"", tarfile.DIRTYPE), ("x/y.txt", b"yes", tarfile.REGTYPE))
    assert [path.name for path in unpack(one, folder_of(one))] == ["y.txt", "z"]
    assert unpack(two, folder_of(two)) == [tmp_path / "b" / "x" / "y.txt"]
    assert (tmp_path / "a" / "x" / "y.txt").read_text() == "yes"


def test_what_is_there_is_replaced(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("new", "1"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("0")
    assert [path.name for path in unpack(archive, tmp_path / "a")] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.zip"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: zip_of(p / "a.zip", ("ok", "1"), ("/etc/x", "1")), "absolute"),
        (lambda p: zip_of(p / "a.zip", ("ok", "1"), ("../x", "1")), "leaves"),
        (lambda p: zip_of(p / "a.zip", ("ok/../../x", "1")), "leaves"),
        (lambda p: zip_of(p / "a.zip", ("C:/x", "1")), "absolute"),
        (lambda p: zip_of(p / "a.zip", ("a\\..\\x", "1")), "leaves"),
        (lambda p: zip_of(p / "a.zip", (link_info("x"), "/etc/passwd")), "link"),
        (lambda p: zip_of(p / "a.zip", ("x", "1"), ("x/y", "1")), "place"),
        (lambda p: zip_of(p / "a.zip", ("bomb", b"\0" * 100_000_000)), "come out"),
        (lambda p: tar_of(p / "a.tar.gz", ("/etc/x", b"1", tarfile.REGTYPE)), "absolute"),
        (lambda p: tar_of(p / "a.tar.gz", ("../x", b"1", tarfile.REGTYPE)), "leaves"),
        (lambda p: tar_of(p / "a.tar.gz", ("x", b"", tarfile.SYMTYPE)), "link"),
        (lambda p: tar_of(p / "a.tar.gz", ("x", b"", tarfile.LNKTYPE)), "link"),
        (lambda p: tar_of(p / "a.tar.gz", ("x", b"", tarfile.FIFOTYPE)), "link or device"),
        (lambda p: tar_of(p / "a.tar.gz", ("x", b"1", tarfile.REGTYPE), ("x", b"2", tarfile.REGTYPE)), "twice"),
    ],
)
def test_what_is_unsafe_is_refused_and_nothing_is_left(tmp_path, make, says):
    archive = make(tmp_path)
    with pytest.raises(DataError, match=says):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_damaged_archive_is_a_data_error(tmp_path, name):
    make = {"a.zip": lambda p: zip_of(p, ("x", "y" * 1000)), "a.tar.gz": lambda p: tar_of(p, ("x", b"y" * 9999, b"0"))}
    archive = make[name](tmp_path / name)
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]
