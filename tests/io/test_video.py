import builtins
import os
import sys
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch

from vitok.errors import InputError
from vitok.io import ClipReader, ClipWriter

av = pytest.importorskip("av")


def moving(frames, height=48, width=64):
    """Smooth colours that change with time, so that compression keeps them and frames can be told apart."""
    t = torch.arange(frames).view(-1, 1, 1)
    y, x = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    parts = torch.broadcast_tensors(40 + y * 2 + t * 0, x * 2 + t * 0, 20 + t * 6 + y * 0)
    return torch.stack(torch.broadcast_tensors(*parts), dim=-1).clamp(0, 255).to(torch.uint8)


def write(path, clip, fps=24):
    with ClipWriter(path, fps) as writer:
        writer.write(clip)
    return path


def encode(path, pictures, codec="mpeg4", rotation=None, **options):
    """A video by PyAV alone, for what ClipWriter does not write."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for picture in pictures.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def read(path, frames=16):
    with ClipReader(path) as clip:
        return torch.cat(list(clip.chunks(frames)))


def refused(path, words):
    with pytest.raises(InputError, match=words) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_round_trip(tmp_path, suffix):
    clip = moving(17)
    path = write(tmp_path / f"a.{suffix}", clip, Fraction(30000, 1001))
    with ClipReader(path) as reader:
        assert (reader.height, reader.width) == (48, 64)
        assert abs(reader.fps - Fraction(30000, 1001)) < 0.01
        assert reader.frames in (17, None)
        chunks = list(reader.chunks(5))
    assert [len(chunk) for chunk in chunks] == [5, 5, 5, 2]
    back = torch.cat(chunks)
    assert back.dtype == torch.uint8 and back.shape == clip.shape
    assert (back.int() - clip.int()).abs().float().mean() < 2.5  # also says that the colour matrices agree
    assert os.listdir(tmp_path) == [path.name]


def test_frames_written_in_parts_and_read_in_parts(tmp_path):
    clip = moving(9)
    with ClipWriter(tmp_path / "a.mp4", 24) as writer:
        for part in clip.split(4):
            writer.write(part)
    with ClipReader(tmp_path / "a.mp4") as reader:
        first = next(reader.chunks(4))
        rest = list(reader.chunks(100))
    assert len(first) == 4 and [len(chunk) for chunk in rest] == [5]
    assert (rest[0][-1].int() - clip[-1].int()).abs().float().mean() < 3


@pytest.mark.parametrize("height, width", [(1, 1), (37, 211), (48, 33)])
def test_odd_sizes_are_padded_to_even(tmp_path, height, width):
    clip = moving(3, height, width)
    back = read(write(tmp_path / "a.mp4", clip))
    assert back.shape == (3, height + height % 2, width + width % 2, 3)
    assert (back[:, :height, :width].int() - clip.int()).abs().float().mean() < 4


def test_without_x264_the_clip_is_mpeg4(tmp_path, monkeypatch):
    real = av.codec.Codec

    def without(name, mode="r"):
        if name == "libx264":
            raise av.codec.codec.UnknownCodecError(name)
        return real(name, mode)

    monkeypatch.setattr(av.codec, "Codec", without)
    clip = moving(5)
    write(tmp_path / "a.mp4", clip, 1000 / 33.3333)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert (read(tmp_path / "a.mp4").int() - clip.int()).abs().float().mean() < 4


@pytest.mark.parametrize("rotation, turns", [(90, 1), (-90, -1), (180, 2)])
def test_rotation_is_applied(tmp_path, rotation, turns):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    clip = moving(3)
    path = encode(tmp_path / "a.mp4", clip, rotation=rotation)
    expected = torch.from_numpy(np.rot90(clip.numpy(), turns, axes=(1, 2)).copy())
    with ClipReader(path) as reader:
        assert (reader.height, reader.width) == expected.shape[1:3]
        (back,) = reader.chunks(10)
    assert (back.int() - expected.int()).abs().float().mean() < 5


def test_reading_does_not_keep_frames(tmp_path):
    path = write(tmp_path / "a.mp4", moving(40))
    with ClipReader(path) as reader:
        alive = []
        for chunk in reader.chunks(4):
            alive.append(weakref.ref(chunk))
            assert sum(ref() is not None for ref in alive) <= 2
            assert chunk.untyped_storage().nbytes() == 4 * 48 * 64 * 3
    assert len(alive) == 10


def test_not_a_video(tmp_path):
    (tmp_path / "text.mp4").write_text("dear diary")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/a.ts\n#EXT-X-ENDLIST\n")
    refused(tmp_path / "text.mp4", "not a video or is damaged")
    refused(tmp_path / "list.mp4", "a")
    refused(tmp_path / "empty.mp4", "empty")
    refused(tmp_path / "none.mp4", "does not exist")
    refused(tmp_path, "is a folder, not a clip")


def test_no_video_stream(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(path, "no video stream")


def test_zero_frames(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    refused(path, "no video")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "faststart.mp4"])
def test_truncated(tmp_path, name):
    options = {"options": {"movflags": "+faststart"}} if name == "faststart.mp4" else {}
    noise = torch.randint(0, 256, (20, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = encode(tmp_path / name, noise, **options)
    assert len(read(path)) == 20
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    refused(path, "is truncated: it is shorter than it says")


@pytest.mark.parametrize("size, lengths", [(4, [4, 3]), (7, [7])])
def test_damage_in_the_middle_gives_the_frames_before_it(tmp_path, size, lengths):
    path = write(tmp_path / "a.mp4", moving(20))
    with ClipReader(path) as reader:
        whole = reader._decoded

        def breaking():
            for number, frame in enumerate(whole):
                if number == 6:
                    raise av.error.InvalidDataError(1, "Invalid data found")
                yield frame

        reader._decoded = breaking()
        got = []
        with pytest.raises(InputError, match="damaged or truncated"):
            got.extend(reader.chunks(size))
    assert [len(chunk) for chunk in got] == lengths


def test_frame_size_that_changes(tmp_path):
    small, large = (encode(tmp_path / f"{n}.m1v", moving(4, n, n), "mpeg1video", format="mpeg1video") for n in (48, 96))
    joined = tmp_path / "joined.m1v"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    got = []
    with ClipReader(joined) as reader, pytest.raises(InputError, match="from 48 x 48 to 96 x 96"):
        got.extend(reader.chunks(16))
    # The decoder may drop the frame that it was holding back when the size changed.
    assert [chunk.shape[1:] for chunk in got] == [(48, 48, 3)] and len(got[0]) >= 3


def test_large_frames_are_refused_before_decoding(tmp_path):
    path = write(tmp_path / "a.mp4", moving(2))
    with pytest.raises(InputError, match=r"64 x 48 pixels, more than the limit of 0\.003 megapixels"):
        ClipReader(path, max_pixels=3000)


def test_names_that_look_like_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("http:x é%d.mp4", moving(2))
    assert len(read("http:x é%d.mp4")) == 2


def test_failed_or_killed_writing_leaves_no_clip(processes, tmp_path):
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), ClipWriter(tmp_path / "a.mp4", 24) as writer:
            writer.write(moving(5))
            raise failure
    with pytest.raises(RuntimeError, match="before"), ClipWriter(tmp_path / "a.mp4", 24):
        raise RuntimeError("before the first frame")
    assert os.listdir(tmp_path) == []
    script = (
        "import os, sys, torch; from vitok.io import ClipWriter\n"
        "with ClipWriter(sys.argv[1], 24) as w:\n"
        "    w.write(torch.zeros(9, 16, 16, 3, dtype=torch.uint8)); os.kill(os.getpid(), 9)"
    )
    assert processes.run([sys.executable, "-c", script, tmp_path / "a.mp4"]).returncode == -9
    assert not (tmp_path / "a.mp4").exists()


def test_writer_refuses(tmp_path):
    with pytest.raises(InputError, match="suffix"):
        ClipWriter(tmp_path / "a.gif", 24)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="fps"):
            ClipWriter(tmp_path / "a.mp4", fps)
    with pytest.raises(InputError, match="no frames"):
        write(tmp_path / "a.mp4", moving(0))
    with pytest.raises(InputError, match="no frames"), ClipWriter(tmp_path / "a.mp4", 24):
        pass
    with (
        pytest.raises(InputError, match="frames of 20 x 20 after frames of 48 x 64"),
        ClipWriter(tmp_path / "a.mp4", 24) as writer,
    ):
        writer.write(moving(1))
        writer.write(moving(1, 20, 20))
    with pytest.raises(InputError, match="uint8"), ClipWriter(tmp_path / "a.mp4", 24) as writer:
        writer.write(moving(1).float())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "file" / "a.mp4", moving(1))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_frames_are_found_by_their_timestamps(tmp_path, suffix):
    path = encode(tmp_path / f"a.{suffix}", moving(40))  # a key frame every 12
    everything, timestamps = read(path), []
    with ClipReader(path) as reader:
        for _ in reader.chunks(1):
            timestamps.append(reader.timestamp)
    assert timestamps == sorted(set(timestamps)) and len(timestamps) == 40
    for number in (39, 0, 13, 12, 11):
        with ClipReader(path) as reader:
            assert reader.seek(timestamps[number])
            assert torch.equal(next(reader.chunks(2)), everything[number : number + 2])
            assert reader.seek(timestamps[5]), "and back"
            assert torch.equal(next(reader.chunks(3)), everything[5:8])
    with ClipReader(path) as reader:
        assert not reader.seek(timestamps[-1] + 10**6) and not reader.seek(timestamps[3] + 1)


def test_skipped_frames_are_left_out(tmp_path):
    path = write(tmp_path / "a.mp4", moving(9))
    everything = read(path)
    with ClipReader(path) as reader:
        reader.skip(2)
        first = next(reader.chunks(3))
        reader.skip(1)
        assert torch.equal(torch.cat([first, *reader.chunks(9)]), everything[[2, 3, 4, 6, 7, 8]])
        reader.skip(5)
        assert list(reader.chunks(1)) == []


def test_without_pyav(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", moving(1))
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "av":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for attempt in (lambda: ClipReader(path), lambda: ClipWriter(tmp_path / "b.mp4", 24)):
        with pytest.raises(InputError, match=r"pip install vitok\[video\]"):
            attempt()


def test_pyav_is_not_imported_before_it_is_needed(processes):
    script = "import sys, vitok.io; sys.exit('av' in sys.modules)"
    assert processes.run([sys.executable, "-c", script]).returncode == 0
