"""Arrays of .npz files that are foreign, broken or hostile: read right, or one WeightsError within bounds."""

import io
import os
import random
import struct
import sys
import time
import zipfile

import numpy
import pytest
import torch

from functional_sd3.formats import npz
from functional_sd3.formats.errors import WeightsError
from functional_sd3.metrics import features, fid
from tests.limits import address_space

LABELS = {"n": 5, "preprocessing": "clean", "weights": "abc", "tap": 192}
MU, SIGMA = numpy.arange(3.0), numpy.eye(3)


def npy(value) -> bytes:
    buffer = io.BytesIO()
    numpy.lib.format.write_array(buffer, numpy.asanyarray(value), allow_pickle=True)
    return buffer.getvalue()


def header(shape: str, dtype: str = "'<f8'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(path, members, method=zipfile.ZIP_DEFLATED):
    """The entries of a file of statistics, some as the bytes of their member."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in ({"mu": MU, "sigma": SIGMA} | LABELS | members).items():
            if content is not None:
                file.writestr(f"{name}.npy", content if isinstance(content, bytes) else npy(content))
    return path


def refused(path, reader=fid.load) -> str:
    with pytest.raises(WeightsError) as caught:
        reader(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_of_either_order_of_bytes_and_indices_are_read(tmp_path, dtype, order):
    sigma = numpy.arange(9.0).reshape(3, 3)
    path = archive(tmp_path / "x.npz", {"mu": MU.astype(dtype), "sigma": numpy.array(sigma, dtype, order=order)})
    found = fid.load(path)
    assert torch.equal(found.statistics.mean, torch.from_numpy(MU))
    assert torch.equal(found.statistics.m2, torch.from_numpy(sigma) * 4)
    values = numpy.arange(6.0).reshape(2, 3).astype(dtype)
    path = archive(tmp_path / "y.npz", {"features": numpy.array(values, order=order)})
    assert features.load(path).values.tolist() == values.tolist()
    assert features.load(path).values.dtype == getattr(torch, f"float{8 * int(dtype[2])}")


HOSTILE = {
    "8 TB": ({"mu": header("(1099511627776,)")}, "says that it has 8,796,093,022,208 bytes"),
    "sizes whose product overflows": ({"mu": header("(4611686018427387904, 8)")}, "says that it has"),
    "a negative size": ({"mu": header("(-3,)")}, "its shape is (-3,)"),
    "a size that is true": ({"mu": header("(True,)") + bytes(8)}, "its shape is (True,)"),
    "no .npy file": ({"mu": b"hello"}, "mu is no .npy file"),
    "an unknown version": ({"mu": b"\x93NUMPY\x09\x00"}, "version (9, 0)"),
    "a deep header": ({"mu": header("(" * 3000 + ")" * 3000)}, "mu is no .npy file"),
    "a header that is code": ({"mu": header("__import__('os').getcwd()")}, "mu is no .npy file"),
    "a header of another type": ({"mu": header("5")}, "mu is no .npy file"),
    "longdouble": ({"mu": MU.astype(numpy.longdouble)}, "float128; floats of at most 64 bits"),
    "complex": ({"mu": MU.astype(complex)}, "mu is complex128"),
    "objects": ({"mu": numpy.array([{}])}, "holds Python objects, whose reading may run code"),
    "records": ({"mu": numpy.zeros(3, "f4,f4")}, "floats of at most 64 bits"),
    "dates": ({"mu": numpy.zeros(3, "M8[s]")}, "floats of at most 64 bits"),
    "truncated": ({"mu": npy(MU)[:-1]}, "mu has other than the 24 bytes"),
    "bytes left over": ({"mu": npy(MU) + b"\0"}, "mu has other than the 24 bytes"),
    "NaN": ({"mu": MU * numpy.nan}, "mu is not all finite"),
    "an infinity": ({"sigma": numpy.full((3, 3), numpy.inf)}, "sigma is not all finite"),
    "a deflate bomb": ({"mu": npy(numpy.zeros(2**23))}, "at most"),
    "a bomb of a label": ({"weights": npy("a" * 2**23)}, "at most"),
    "a label that is a list": ({"n": [5, 6]}, "n"),
    "a label of another type": ({"tap": "many"}, "tap is 'many', not int"),
    "a label of another kind": ({"preprocessing": 3}, "preprocessing is 3, not str"),
}


@pytest.mark.parametrize(("members", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_member_is_refused_by_name(tmp_path, members, said):
    assert said in refused(archive(tmp_path / "x.npz", members))


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf])
def test_features_that_are_not_finite_are_refused(tmp_path, value):
    path = archive(tmp_path / "x.npz", {"features": numpy.full((4, 3), value)})
    assert "features are not all finite" in refused(path, features.load)


def test_encrypted_unknown_and_doubled_members_are_refused(tmp_path):
    path = archive(tmp_path / "x.npz", {})
    whole = path.read_bytes()
    for offset, value, said in ((8, 1, "is encrypted"), (10, 99, "is packed by method 99, not by deflate")):
        content = bytearray(whole)
        place = content.index(b"PK\x01\x02")
        content[place + offset] = value
        path.write_bytes(bytes(content))
        assert said in refused(path)
    path = archive(tmp_path / "y.npz", {}, zipfile.ZIP_BZIP2)
    assert "is packed by method 12" in refused(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "z.npz", "w") as file:
        file.writestr("mu.npy", npy(MU))
        file.writestr("mu.npy", npy(SIGMA))
    assert "holds mu.npy 2 times" in refused(tmp_path / "z.npz")
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as file:
        file.writestr("\x1b[31m.png", b"")
    assert "a zip archive of \\x1b[31m.png" in refused(tmp_path / "images.npz")


def test_special_files_are_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    assert "is a named pipe, not a file" in refused(tmp_path / "x.npz")
    assert "is a folder, not a file" in refused(tmp_path)


def test_a_sample_batch_of_guided_diffusion_is_named(tmp_path):
    numpy.savez(tmp_path / "x.npz", numpy.zeros((7, 4, 6, 3), numpy.uint8))
    for reader in (fid.load, features.load):
        said = "holds 7 images of 6x4 (arr_0, a sample batch of guided-diffusion), which are read from a folder"
        assert said in refused(tmp_path / "x.npz", reader)
    numpy.savez(tmp_path / "y.npz", numpy.zeros(3), other=numpy.zeros(3))
    assert "holds other, arr_0 and no statistics" in refused(tmp_path / "y.npz")


def test_the_reference_batches_of_guided_diffusion_give_their_statistics(tmp_path):
    """They hold images beside two pairs of statistics; what is not asked for is not unpacked, nor looked at."""
    path = archive(
        tmp_path / "x.npz",
        {"arr_0": header("(10000, 256, 256, 3)", "'|u1'"), "mu_s": MU, "notes": b"x", **dict.fromkeys(LABELS)},
    )
    found = fid.load(path, **LABELS)
    assert found.statistics.n == 5 and found.statistics.mean.tolist() == MU.tolist()


def test_a_file_written_here_and_a_compressed_one_read_back(tmp_path):
    npz.write(tmp_path / "x.npz", {"features": numpy.ones((3, 4), numpy.float32), **LABELS})
    numpy.savez_compressed(tmp_path / "y.npz", features=numpy.ones((3, 4), numpy.float32), **LABELS)
    assert torch.equal(features.load(tmp_path / "x.npz").values, torch.ones(3, 4))
    assert torch.equal(features.load(tmp_path / "y.npz").values, torch.ones(3, 4))


def test_a_mutated_file_is_read_or_one_error(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "x.npz"
    started = time.process_time()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        whole = archive(path, {}, method).read_bytes()
        for _ in range(100):
            content = bytearray(whole)
            for _ in range(draw.randrange(1, 4)):
                place = draw.choice((draw.randrange(len(content)), -draw.randrange(1, min(420, len(content)))))
                content[place] = draw.randrange(256)
            if not draw.randrange(5):
                del content[draw.randrange(len(content)) :]
            path.write_bytes(bytes(content))
            for reader in (fid.load, lambda path: npz.headers(path, "statistics")):
                try:
                    reader(path)
                except WeightsError as error:
                    assert str(path) in str(error)
    assert time.process_time() - started < 40


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_bombs_take_little_memory(tmp_path):
    bomb = header("(16777216,)") + bytes(2**27)
    paths = [
        archive(tmp_path / "declared.npz", {"mu": header("(1099511627776,)")}),
        archive(tmp_path / "bomb.npz", {"mu": bomb}),
        archive(tmp_path / "no array.npz", {"mu": bytes(2**27)}),
        archive(tmp_path / "header.npz", {"mu": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**27) + b" " * 2**27}),
    ]
    del bomb
    with address_space(100 * 2**20):
        for path in paths:
            refused(path)
