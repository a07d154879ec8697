"""The reader finds in every file exactly the arrays that pickle finds, at the place it says, without loading any."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from xai_files import float_file, int8_file, tensor_files, unpickled

from grok1.conversion.xai.checkpoint import read_tensor_file, resolve_folder
from grok1.conversion.xai.writer import tensor_frame
from grok1.errors import CheckpointError


def located(path):
    tensor = read_tensor_file(path)
    arrays = [tensor.weight] if tensor.scales is None else [tensor.weight, tensor.scales]
    data = path.read_bytes()
    return [(a.dtype, a.shape, data[a.offset : a.offset + a.nbytes]) for a in arrays]


@pytest.mark.parametrize("name", ["tiny-1", "tiny-8"])
def test_every_golden_file_is_read_as_pickle_reads_it(golden, name):
    files = tensor_files(golden / name / "ckpt-0")
    assert len(files) == {"tiny-1": 38, "tiny-8": 146}[name]
    for path in files:
        assert located(path) == unpickled(path.read_bytes())


def test_every_true_norm_and_router_is_read_as_pickle_reads_it(assets):
    files = tensor_files(assets / "small-files")
    assert len(files) == 321
    for path in files:
        assert located(path) == unpickled(path.read_bytes())


def test_rows_of_an_expert_are_read_by_position_from_many_threads(golden):
    tensor = read_tensor_file(golden / "tiny-8" / "ckpt-0" / "tensor00003_000")
    (_, shape, data), (_, scales_shape, scale_data) = unpickled(tensor.path.read_bytes())
    weight = np.frombuffer(data, np.int8).reshape(shape)
    with ThreadPoolExecutor(8) as pool:
        cases = [
            (e, start, stop) for e in range(8) for start in (0, 5, 170) for stop in (5 + start, 176) if stop <= 176
        ]
        rows = list(pool.map(lambda case: tensor.weight.read_rows((case[0],), case[1], case[2]), cases))
    for (e, start, stop), block in zip(cases, rows, strict=True):
        assert block.flags.writeable
        np.testing.assert_array_equal(block, weight[e, start:stop])
    scales = np.frombuffer(scale_data, np.uint16).reshape(scales_shape)
    np.testing.assert_array_equal(tensor.scales.read(), scales)
    np.testing.assert_array_equal(tensor.scales.read_rows((7,), 2, 3), scales[7, 2:3])
    np.testing.assert_array_equal(tensor.weight.read_rows((5, 170), 3, 9), weight[5, 170, 3:9])
    assert tensor.weight.read_rows((), 3, 3).shape == (0, 176, 32)
    for lead, start, stop in [((8,), 0, 1), ((-1,), 0, 1), ((0,), 0, 177), ((0,), -1, 1), ((0, 0, 0), 0, 1)]:
        with pytest.raises(IndexError):
            tensor.weight.read_rows(lead, start, stop)


def test_a_file_of_the_releases_largest_size_is_located_from_its_header(tmp_path):
    """3.2 GB with a hole for the array: a kilobyte is read, and the last row lies where it should."""
    frame = tensor_frame((131072, 6144))
    path = tmp_path / "tensor00000_000"
    last = np.arange(6144, dtype=np.float32)
    with path.open("wb") as file:
        file.write(frame.before)
        file.seek(len(frame.before) + frame.weight_nbytes - last.nbytes)
        file.write(last.tobytes() + frame.after)
    assert path.stat().st_size == 3221225637
    tracemalloc.start()
    tensor = read_tensor_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    np.testing.assert_array_equal(tensor.weight.read_rows((), 131071, 131072), last[None])


def test_a_source_that_changes_during_the_run_is_noticed(tmp_path):
    path = tmp_path / "tensor00001_000"
    path.write_bytes(float_file(np.arange(64, dtype=np.float32)))
    tensor = read_tensor_file(path)
    tensor.check_unchanged()
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"tensor00001_000: expected at least \d+ bytes, found 300"):
        tensor.weight.read()
    with pytest.raises(CheckpointError, match=r"tensor00001_000: expected \d+ bytes, .* found 300 bytes"):
        tensor.check_unchanged()
    path.unlink()
    with pytest.raises(CheckpointError, match="tensor00001_000"):
        tensor.weight.read()
    with pytest.raises(CheckpointError, match="tensor00001_000"):
        tensor.check_unchanged()


@pytest.mark.parametrize("below", ["", "ckpt-0", "ckpt"])
def test_the_folder_is_found_from_above_and_from_itself(tmp_path, below):
    folder = tmp_path / "src" / below
    folder.mkdir(parents=True)
    (folder / "tensor00000_000").write_bytes(b"")
    assert resolve_folder(tmp_path / "src") == folder
    assert resolve_folder(folder) == folder


def test_a_folder_without_tensors_is_refused_with_the_places_that_were_searched(tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor00000_000 and so on in .*ckpt-0.*ckpt, found none"):
        resolve_folder(tmp_path)
    with pytest.raises(CheckpointError, match="expected a folder, found nothing"):
        resolve_folder(tmp_path / "nowhere")


def test_a_ckpt_folder_that_leads_out_of_the_tree_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tensor00000_000").write_bytes(b"")
    source = tmp_path / "src"
    source.mkdir()
    (source / "ckpt-0").symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link out of the checkpoint"):
        resolve_folder(source)
    link = tmp_path / "link"
    link.symlink_to(outside)
    assert resolve_folder(link) == link  # What the user names is the user's choice.


def test_shapes_and_offsets_of_a_quantised_file(tmp_path):
    weight = np.arange(-48, 48, dtype=np.int8).reshape(2, 8, 6)
    bits = np.arange(24, dtype=np.uint16).reshape(2, 2, 6) + 0x3F80
    path = tmp_path / "tensor00003_000"
    path.write_bytes(int8_file(weight, bits))
    tensor = read_tensor_file(path)
    assert (tensor.weight.dtype, tensor.weight.shape) == ("int8", (2, 8, 6))
    assert (tensor.scales.dtype, tensor.scales.shape) == ("bfloat16", (2, 2, 6))
    np.testing.assert_array_equal(tensor.weight.read(), weight)
    np.testing.assert_array_equal(tensor.scales.read(), bits)
