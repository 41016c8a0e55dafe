"""16-bit PCM as it stands in packed audio: a part of it is read by its bytes, with no decoder between."""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np

HEADER = 44
"""Bytes of the WAV header that :func:`wav_header` makes."""

SCALE = 32768
"""A sample of 16 bits is divided by this, as libsndfile does, which float32 holds exactly."""


def wav_header(num_samples: int, sample_rate: int) -> bytes:
    """The header of a WAV file of 16-bit mono."""
    size = 2 * num_samples
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", HEADER - 8 + size, b"WAVE") + form + struct.pack("<4sI", b"data", size)


def encode_wav(waveform: np.ndarray, sample_rate: int) -> bytes:
    """A whole WAV file of 16 bits: exact for what was decoded from 16 bits, else rounded, and clipped at full scale.

    Arguments
    ---------
    waveform : (samples,) float32, nominal range -1 to 1.
    sample_rate : Hz.
    """
    samples = np.clip(np.rint(waveform * np.float32(SCALE)), -SCALE, SCALE - 1).astype("<i2")
    return wav_header(len(samples), sample_rate) + samples.tobytes()


class PcmReader:
    """Reads such a WAV file through the few members of ``soundfile.SoundFile`` that :class:`AudioFile` uses.

    Arguments
    ---------
    file : an unbuffered file, which stays the caller's to close.
    sample_rate : Hz.
    frames : number of samples.
    """

    format, subtype, channels = "WAV", "PCM_16", 1

    def __init__(self, file: BinaryIO, sample_rate: int, frames: int) -> None:
        self.samplerate, self.frames = sample_rate, frames
        self._file, self._place = file, 0

    @classmethod
    def of(cls, file: BinaryIO, size: int) -> PcmReader | None:
        """A reader of ``file``, which has ``size`` bytes; None if it does not begin with exactly our header.

        The file is left at its beginning.
        """
        file.seek(0)
        header = file.read(HEADER)
        file.seek(0)
        frames, odd = divmod(size - HEADER, 2)
        if len(header) < HEADER or odd or header[:4] != b"RIFF":
            return None
        sample_rate = int.from_bytes(header[24:28], "little")
        # A rate beyond this has no place in the header's field of bytes per second.
        if sample_rate >= 1 << 31 or header != wav_header(frames, sample_rate):
            return None
        return cls(file, sample_rate, frames)

    def tell(self) -> int:
        """The next sample that is read."""
        return self._place

    def seek(self, frame: int) -> int:
        """Go to a sample."""
        self._place = frame
        return frame

    def read(self, frames: int, dtype: str = "float32") -> np.ndarray:
        """The next samples (frames,), fewer where the file ends."""
        wanted = max(0, min(frames, self.frames - self._place))
        samples = np.empty(wanted, dtype="<i2")
        self._file.seek(HEADER + 2 * self._place)
        count = self._file.readinto(samples.view(np.uint8)) // 2  # type: ignore[attr-defined]
        self._place += count
        return np.multiply(samples[:count], np.float32(1 / SCALE), dtype=dtype)

    def close(self) -> None:
        """Nothing to do: the file is the caller's."""
