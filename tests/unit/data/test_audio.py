"""Audio: every readable kind becomes mono float32 at the rate asked for, and every bad file a sentence."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import soundfile
import soxr

from toolkit.data.audio import AudioFile, AudioInfo, audio_info, normalize_waveform, read_audio
from toolkit.errors import AudioError

READABLE = {
    "stereo_44100.wav": AudioInfo(44100, 44100, 2),
    "mono_16000_24bit.wav": AudioInfo(16000, 24000, 1),
    "mono_16000_float32.wav": AudioInfo(16000, 16000, 1),
    "mono_8000_ulaw.wav": AudioInfo(8000, 12000, 1),
    "mono_8000.mp3": AudioInfo(8000, 12000, 1),
    "clipped_16000.flac": AudioInfo(16000, 24000, 1),
    "silence_1s.wav": AudioInfo(16000, 16000, 1),
    "one_sample.wav": AudioInfo(16000, 1, 1),
}


@pytest.mark.parametrize("name", READABLE)
def test_header_and_samples(odd_audio, name):
    info = audio_info(odd_audio / name)
    assert info == READABLE[name]
    assert info.duration == info.num_samples / info.sample_rate
    for rate in (None, 8000, 16000, 44100):
        samples = read_audio(odd_audio / name, sample_rate=rate)
        assert samples.dtype == np.float32
        assert samples.shape == (info.num_samples_at(rate or info.sample_rate),)


def test_opus_at_whatever_rate_the_library_gives(odd_audio):
    samples = read_audio(odd_audio / "opus_16000.opus", sample_rate=16000)
    assert len(samples) == 24000
    reference = read_audio(odd_audio / "mono_16000_24bit.wav", sample_rate=16000)
    assert np.corrcoef(samples, reference)[0, 1] > 0.9


def test_channels_are_averaged_and_resampled(odd_audio):
    both, rate = soundfile.read(odd_audio / "stereo_44100.wav", dtype="float32")
    assert not np.allclose(both[:, 0], both[:, 1])
    mean = both.mean(axis=1)
    assert np.array_equal(read_audio(odd_audio / "stereo_44100.wav"), mean)
    wanted = soxr.resample(mean, rate, 16000)
    assert np.array_equal(read_audio(odd_audio / "stereo_44100.wav", sample_rate=16000), wanted)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(tmp_path, rate):
    time = np.arange(rate) / rate
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * time), rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "tone.wav", sample_rate=16000)
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert len(samples) == 16000
    np.testing.assert_allclose(samples[800:-800], wanted[800:-800], atol=1e-3)


PARTS = [(0, 100), (1, 1), (1234, 500), (6000, 5999), (11000, 5000), (7777, None)]


@pytest.mark.parametrize("rate", [None, 8000, 16000, 11025])
@pytest.mark.parametrize(
    "name", ["stereo_44100.wav", "mono_8000.mp3", "mono_8000_ulaw.wav", "opus_16000.opus", "clipped_16000.flac"]
)
def test_a_part_is_that_part_of_the_whole(odd_audio, name, rate, capfd):
    with AudioFile(odd_audio / name) as audio:
        whole = audio.read(sample_rate=rate)
        for start, count in PARTS:
            if start >= len(whole):
                continue
            part = audio.read(sample_rate=rate, start=start, num_samples=count)
            wanted = whole[start:] if count is None else whole[start : start + count]
            assert part.shape == wanted.shape
            # Opus carries a state from packet to packet that 80 ms of run-in restore only nearly.
            np.testing.assert_allclose(part, wanted, rtol=0, atol=2e-2 if "opus" in name else 3e-6)
    # The MP3 decoder must not write its complaints to the terminal.
    assert capfd.readouterr().err == ""


def test_long_odd_ratio_parts(tmp_path):
    samples = np.random.Generator(np.random.PCG64(1)).standard_normal(5 * 44101).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "odd.wav", samples, 44101, subtype="FLOAT")
    whole = read_audio(tmp_path / "odd.wav", sample_rate=16000)
    part = read_audio(tmp_path / "odd.wav", sample_rate=16000, start=40001, num_samples=2000)
    np.testing.assert_allclose(part, whole[40001:42001], rtol=0, atol=3e-6)


def test_parts_do_not_decode_the_rest(odd_audio):
    """A truncated file gives its good part, so only that part was decoded."""
    assert len(read_audio(odd_audio / "truncated.flac", sample_rate=16000, start=1000, num_samples=2000)) == 2000


def bad(path, name):
    return str(path / name)


def test_sentences_for_bad_files(odd_audio, tmp_path):
    (tmp_path / "not.zip").write_bytes(b"nothing here" * 20)
    sentences = {
        str(tmp_path / "no.flac"): "{path} does not exist; check the paths in the manifest and the data folder.",
        str(tmp_path): "{path} is a folder, not an audio file; check the paths in the manifest.",
        bad(odd_audio, "empty_file.wav"): "{path} is empty (0 bytes); copy or download the file again.",
        bad(odd_audio, "zero_samples.wav"): (
            "{path} holds no samples; remove it from the manifest or record it again."
        ),
        bad(odd_audio, "text_renamed.flac"): (
            "{path} is not an audio file that can be read (WAV, FLAC, Ogg, Opus, MP3); convert it or copy it again."
        ),
        bad(odd_audio, "truncated.flac"): (
            "{path} is truncated or corrupt: it opens, but cannot be decoded from sample 0 to 93680 of 93680; "
            "copy or download the file again."
        ),
        bad(tmp_path, "not.zip:10:100"): (
            "{path} is no audio entry of the archive; write its manifest again, with entries stored uncompressed."
        ),
    }
    for path, sentence in sentences.items():
        with pytest.raises(AudioError) as caught:
            read_audio(path, sample_rate=16000)
        assert str(caught.value) == sentence.format(path=path)
    with pytest.raises(AudioError) as caught:
        read_audio(tmp_path / "no.zip:10:100")
    assert str(caught.value) == (
        f"{tmp_path / 'no.zip'} does not exist; check the paths in the manifest and the data folder."
    )


def test_part_beyond_the_end(odd_audio):
    with pytest.raises(AudioError) as caught:
        read_audio(odd_audio / "silence_1s.wav", sample_rate=8000, start=8000)
    assert str(caught.value) == (
        f"{odd_audio / 'silence_1s.wav'} has 8000 samples at 8000 Hz, but a part from sample 8000 on is wanted."
    )
    assert len(read_audio(odd_audio / "silence_1s.wav", start=15990, num_samples=100)) == 10


def test_samples_that_are_no_numbers(tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2], dtype=np.float32), 16000, subtype="FLOAT")
    with pytest.raises(AudioError) as caught:
        read_audio(tmp_path / "nan.wav")
    assert str(caught.value) == (
        f"{tmp_path / 'nan.wav'} holds samples that are not finite numbers; write the file again."
    )


def test_a_header_that_lies_takes_no_memory(tmp_path):
    path = tmp_path / "lying.flac"
    soundfile.write(path, np.zeros(8000, dtype=np.int16), 8000)
    header = bytearray(path.read_bytes())
    header[21], header[22:26] = header[21] | 0x0F, b"\xff" * 4  # the number of samples: 2 ** 36 - 1, 275 GB of floats
    path.write_bytes(header)
    assert soundfile.info(path).frames == 2**36 - 1
    # a zip entry is as long as its name says
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "lying.flac")
        offset = archive.infolist()[0].header_offset + 30 + len("lying.flac")
    for source in (path, f"{tmp_path / 'a.zip'}:{offset}:{len(header)}"):
        with pytest.raises(AudioError) as caught:
            read_audio(source)
        assert str(caught.value) == f"{source} has a broken header; copy or encode the file again."
    silence = tmp_path / "silence.flac"
    soundfile.write(silence, np.zeros(8000 * 600, dtype=np.int16), 8000)
    assert len(read_audio(silence)) == 8000 * 600


def test_normalization():
    samples = np.random.Generator(np.random.PCG64(0)).standard_normal(1000).astype(np.float32) * 3 + 5
    normal = normalize_waveform(samples)
    assert normal.dtype == np.float32
    wanted = (samples - samples.mean(dtype=np.float64)) / np.sqrt(samples.var(dtype=np.float64) + 1e-5)
    np.testing.assert_allclose(normal, wanted, atol=2e-6)
    assert np.array_equal(normalize_waveform(np.zeros(10, np.float32)), np.zeros(10, np.float32))
    # Small signals show the eps: population variance 1e-6 is far below it.
    quiet = np.array([0.001, -0.001] * 50, dtype=np.float32)
    np.testing.assert_allclose(normalize_waveform(quiet), quiet / np.sqrt(1.1e-5), rtol=1e-5)
