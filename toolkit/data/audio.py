"""Read audio: whole files or parts of them, any rate and channels, plain files or entries of a stored zip or a tar.

Everything comes out as mono float32 at the rate asked for. libsndfile (through soundfile) decodes WAV, FLAC, Ogg
Vorbis, Opus, MP3 and more; soxr changes the rate.
"""

from __future__ import annotations

import io
import math
import os
import re
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from toolkit.data.pcm import PcmReader
from toolkit.data.tar_format import BLOCK, entry_size
from toolkit.errors import AudioError

__all__ = ["AudioFile", "AudioInfo", "audio_info", "normalize_waveform", "read_audio"]

RESAMPLING_MARGIN = 0.1
"""Seconds read on both sides of a part that is resampled: soxr's filter is shorter at any speech rate."""

LONGEST = 1 << 40
"""Frames beyond which a header is taken for nonsense (libsndfile reports broken streams as endless)."""

DENSEST = 1 << 13
"""Samples of a channel in a byte, beyond which a header is taken for nonsense: FLAC's longest blocks of silence have
6,000."""

NORMALIZATION_EPS = 1e-5
"""fairseq normalizes a waveform with torch's layer_norm and its default eps."""

NO_SEEK = ("MP3", "MPEG")
"""Formats always read from the beginning: after a seek the MP3 decoder lacks earlier bits and says so on stderr."""

ZIP_ENTRY = re.compile(r"(?P<archive>.+\.zip):(?P<offset>\d{1,31}):(?P<length>\d{1,31})", re.IGNORECASE | re.DOTALL)
"""fairseq's name for an uncompressed entry of a zip archive: where its bytes begin, and how many there are."""

ENTRY = re.compile(ZIP_ENTRY.pattern.replace("zip", "(?:zip|tar)"), ZIP_ENTRY.flags)
"""The same for a tar too, as shards are; of these the entry's header is checked, which stands before its bytes."""

ENTRY_BUFFER = 1 << 16
"""Bytes of an entry read at once."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says.

    Arguments
    ---------
    sample_rate : Hz.
    num_samples : samples per channel at that rate.
    channels : number of channels.
    """

    sample_rate: int
    num_samples: int
    channels: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / self.sample_rate

    def num_samples_at(self, sample_rate: int) -> int:
        """Samples after resampling to ``sample_rate``, as soxr gives them."""
        if sample_rate == self.sample_rate:
            return self.num_samples
        return math.floor(self.num_samples * sample_rate / self.sample_rate + 0.5)


class AudioFile:
    """An open audio file, to read several parts of, or to look at the length before deciding which.

    Arguments
    ---------
    path : a file, or fairseq's ``archive.zip:OFFSET:LENGTH``, an uncompressed entry of a zip by its bytes, or a shard's
        ``shard.tar:OFFSET:LENGTH``.

    Raises
    ------
    AudioError, naming the file, if it is missing, cannot be read, is no audio, or holds no samples.

    Example
    -------
    >>> import soundfile, tempfile
    >>> path = tempfile.mkdtemp() + "/tone.wav"
    >>> soundfile.write(path, [[0.5, 0.25]] * 8000, 8000)
    >>> with AudioFile(path) as audio:
    ...     audio.info, audio.read(sample_rate=8000, start=10, num_samples=3).tolist()
    (AudioInfo(sample_rate=8000, num_samples=8000, channels=2), [0.375, 0.375, 0.375])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._source: BinaryIO | None = None
        self._file: soundfile.SoundFile | PcmReader | None = None
        try:
            self._source = open_entry(self.path)
            if self._source is not None:
                self._file = PcmReader.of(self._source.raw, self._source.raw.length)  # type: ignore[attr-defined]
            if self._file is None:
                self._file = soundfile.SoundFile(self.path if self._source is None else self._source)
        except (RuntimeError, TypeError, OSError, OverflowError) as error:
            if self._source is not None:
                self._source.close()
            raise AudioError(_why_not_opened(self.path)) from error
        self.info = AudioInfo(self._file.samplerate, self._file.frames, self._file.channels)
        if self.info.num_samples == 0:
            self.close()
            raise AudioError(f"{self.path} holds no samples; remove it from the manifest or record it again.")
        is_known = 0 < self.info.num_samples < LONGEST and self.info.sample_rate > 0
        # Not to be read as if it were true: memory would be taken for all that the header claims.
        if not is_known or self.info.num_samples > DENSEST * self._num_bytes():
            self.close()
            raise AudioError(f"{self.path} has a broken header; copy or encode the file again.")

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _num_bytes(self) -> int:
        """Bytes of the file or entry."""
        if self._source is None:
            return os.path.getsize(self.path)
        return self._source.raw.length  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._source is not None:
            self._source.close()

    @property
    def format(self) -> str:
        """The container by libsndfile's name: "FLAC", "WAV", "OGG", "MP3", ..."""
        return self._file.format

    def read(self, *, sample_rate: int | None = None, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """Decode a part: mean over the channels, resampled to ``sample_rate``.

        Arguments
        ---------
        sample_rate : Hz; None = the file's own.
        start : first sample wanted, counted at ``sample_rate``.
        num_samples : how many, at ``sample_rate``; None = to the end. At the end of the file there may be fewer.

        Returns
        -------
        (samples,) float32. A resampled part equals the same part of the whole resampled file to about 1e-6.

        Raises
        ------
        AudioError if the file ends early or is corrupt, ``start`` lies beyond its end, or a sample is not finite.
        """
        rate = self.info.sample_rate if sample_rate is None else int(sample_rate)
        total = self.info.num_samples_at(rate)
        end = total if num_samples is None else min(total, start + num_samples)
        if not 0 <= start < max(1, total):
            raise AudioError(
                f"{self.path} has {total} samples at {rate} Hz, but a part from sample {start} on is wanted."
            )
        if rate == self.info.sample_rate:
            return self._decode(start, end)
        step = math.gcd(rate, self.info.sample_rate)
        unit_in, unit_out = self.info.sample_rate // step, rate // step
        # A start that is a whole number of units keeps the two sample grids in step.
        first = max(0, start // unit_out - math.ceil(RESAMPLING_MARGIN * step))
        last = math.ceil(end / unit_out) + math.ceil(RESAMPLING_MARGIN * step)
        piece = self._decode(first * unit_in, min(self.info.num_samples, last * unit_in))
        resampled = soxr.resample(piece, self.info.sample_rate, rate)
        return np.ascontiguousarray(resampled[start - first * unit_out : end - first * unit_out])

    def _decode(self, start: int, end: int) -> np.ndarray:
        """Samples ``start`` to ``end`` at the file's own rate, as mono float32."""
        try:
            first = 0 if self._file.format in NO_SEEK else start
            if first != self._file.tell():
                self._file.seek(first)
            samples = self._file.read(end - first, dtype="float32")[start - first :]
        except RuntimeError as error:
            raise AudioError(
                f"{self.path} is truncated or corrupt: it opens, but cannot be decoded from sample {start} to {end} of "
                f"{self.info.num_samples}; copy or download the file again."
            ) from error
        if len(samples) < end - start:
            raise AudioError(
                f"{self.path} is truncated or corrupt: it ends after sample {start + len(samples)} where its header "
                f"says {self.info.num_samples}; copy or download the file again."
            )
        if samples.ndim == 2:
            samples = samples.mean(axis=1, dtype=np.float32)
        # Only files of floating point numbers can hold something else than numbers.
        if self._file.subtype in ("FLOAT", "DOUBLE") and not np.isfinite(samples).all():
            raise AudioError(f"{self.path} holds samples that are not finite numbers; write the file again.")
        return samples


def audio_info(path: str | os.PathLike[str]) -> AudioInfo:
    """Rate, samples and channels of a file (or zip entry) from its header; raises AudioError as :class:`AudioFile`."""
    with AudioFile(path) as audio:
        return audio.info


def read_audio(
    path: str | os.PathLike[str], *, sample_rate: int | None = None, start: int = 0, num_samples: int | None = None
) -> np.ndarray:
    """Read a file, or a part of it, as mono float32 at ``sample_rate``: see :meth:`AudioFile.read`.

    Returns (samples,) float32; raises AudioError in one sentence with the file's name.
    """
    with AudioFile(path) as audio:
        return audio.read(sample_rate=sample_rate, start=start, num_samples=num_samples)


def normalize_waveform(waveform: np.ndarray) -> np.ndarray:
    """Zero mean and unit (population) variance over a whole utterance, eps 1e-5, as fairseq's ``normalize: true``.

    Arguments
    ---------
    waveform : (samples,) float32.

    Returns
    -------
    (samples,) float32. Digital silence stays silence.
    """
    centered = waveform - waveform.mean(dtype=np.float64).astype(np.float32)
    variance = float(np.dot(centered, centered)) / max(1, len(centered))
    return centered * np.float32(1.0 / math.sqrt(variance + NORMALIZATION_EPS))


class FileWindow(io.RawIOBase):
    """The bytes of a file from ``offset`` on, ``length`` of them, as if they were a file of their own."""

    def __init__(self, path: str, offset: int, length: int) -> None:
        super().__init__()
        self._bytes = open(path, "rb", buffering=0)
        self._offset, self._place = offset, 0
        self.length = max(0, min(length, os.fstat(self._bytes.fileno()).st_size - offset))

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte; returns which."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def before(self, count: int) -> bytes:
        """The file's ``count`` bytes before the window, fewer where there are not so many."""
        self._bytes.seek(max(0, self._offset - count))
        return self._bytes.read(min(count, self._offset))

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Fill the buffer as far as there are bytes; returns how many."""
        wanted = min(len(buffer), self.length - self._place)
        if wanted <= 0:
            return 0
        self._bytes.seek(self._offset + self._place)
        count = self._bytes.readinto(memoryview(buffer)[:wanted])
        self._place += count
        return count

    def close(self) -> None:
        """Close the file behind."""
        if not self.closed:
            self._bytes.close()
        super().close()


def open_entry(path: str) -> io.BufferedReader | None:
    """A window on a zip's or tar's entry, of which only what is wanted is read; None for a file of its own.

    Raises
    ------
    AudioError : the header of a tar's entry does not stand before it, or says another size.
    OSError : the archive cannot be opened.
    """
    entry = ENTRY.fullmatch(path)
    if entry is None or os.path.exists(path):
        return None
    length = int(entry["length"])
    window = FileWindow(entry["archive"], int(entry["offset"]), length)
    is_tar = entry["archive"][-4:].lower() == ".tar"
    if is_tar and (window.length != length or entry_size(window.before(BLOCK)) != length):
        window.close()
        raise AudioError(
            f"{path} is no entry of the shard, or one of another size; write the shards and their manifest again, or "
            "copy them again if this happened on the way."
        )
    return io.BufferedReader(window, ENTRY_BUFFER)


def _why_not_opened(path: str) -> str:
    """The sentence for a file that soundfile could not open."""
    entry = ENTRY.fullmatch(path)
    file = entry["archive"] if entry and not os.path.exists(path) else path
    if not os.path.exists(file):
        return f"{file} does not exist; check the paths in the manifest and the data folder."
    if os.path.isdir(file):
        return f"{file} is a folder, not an audio file; check the paths in the manifest."
    if not os.access(file, os.R_OK):
        return f"{file} may not be read; change its rights."
    if os.path.getsize(file) == 0:
        return f"{file} is empty (0 bytes); copy or download the file again."
    if file != path:
        assert entry is not None
        end, size = int(entry["offset"]) + int(entry["length"]), os.path.getsize(file)
        if end > size:
            return f"{path} ends at byte {end}, but the archive has {size}; write its manifest again."
        return f"{path} is no audio entry of the archive; write its manifest again, with entries stored uncompressed."
    return f"{path} is not an audio file that can be read (WAV, FLAC, Ogg, Opus, MP3); convert it or copy it again."
