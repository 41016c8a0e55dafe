"""Speech from espeak-ng, through the shared library that the package ``espeakng-loader`` ships.

The engine is loaded here and nowhere else (it is GPL-3; the toolkit never imports it). An utterance
spoken by it depends on what was spoken before, and breathy voices draw random numbers; so each
utterance is spoken in a forked child of its own with a seed of its own, which makes the samples a
function of (text, voice, seed) alone, in any order. A fork costs about 10 ms.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MISSING_LOADER = "the package espeakng-loader is not installed; run `make venv`, or `pip install espeakng-loader`."

_RETRIEVAL_SYNCHRONOUS = 2  # samples come back through the callback before espeak_Synchronize returns
_DO_NOT_EXIT = 0x8000  # errors are returned to us instead of ending the process
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4  # espeak_SetParameter's names
_TEXT_UTF8, _BY_CHARACTER = 1, 1


class SpeechError(RuntimeError):
    """The synthesiser cannot be loaded, or does not know a voice."""


class _Event(ctypes.Structure):
    """One entry of the event list that comes with the samples; type 0 closes the list."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Voice:
    """How to speak: an accent with a speaker's variant, and the manner.

    Arguments
    ---------
    accent : one of espeak-ng's languages, such as ``en-us``.
    variant : a file of its ``voices/!v`` folder, such as ``f3``.
    rate : words per minute, 80 to 450.
    pitch : 0 to 99, 50 is the variant's own.
    pitch_range : 0 (monotone) to 99, 50 is the variant's own.
    """

    accent: str
    variant: str
    rate: int = 165
    pitch: int = 50
    pitch_range: int = 50


class Espeak:
    """The synthesiser, initialized once in a process that has not started threads of its own.

    Raises
    ------
    SpeechError : the package is missing, or the library does not start.

    Example
    -------
    >>> engine = Espeak()
    >>> one = engine.speak("red boxes", Voice("en-us", "f3"), seed=1)
    >>> other = engine.speak("green windows", Voice("en-us", "m1"), seed=2)
    >>> bool((engine.speak("red boxes", Voice("en-us", "f3"), seed=1) == one).all()), one.dtype
    (True, dtype('int16'))
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise SpeechError(MISSING_LOADER) from error
        if not hasattr(os, "fork"):
            raise SpeechError("this system cannot fork a process, which the demo corpus needs; use Linux or macOS.")
        data = Path(espeakng_loader.get_data_path())
        self._variants = frozenset(path.name for path in (data / "voices" / "!v").iterdir())
        try:
            self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        except OSError as error:
            raise SpeechError(f"the espeak-ng library does not load on this machine: {error}.") from error
        self._declare()
        self._chunks: list[bytes] = []
        self._callback = _CALLBACK(self._receive)  # C holds the pointer: the object has to live as long
        rate = self._library.espeak_Initialize(_RETRIEVAL_SYNCHRONOUS, 0, os.fsencode(data), _DO_NOT_EXIT)
        if rate <= 0:
            raise SpeechError(f"espeak-ng did not start (code {rate}) with its data in {data}; reinstall the package.")
        self.sample_rate: int = rate
        self._library.espeak_SetSynthCallback(self._callback)

    def _declare(self) -> None:
        """The argument types of the six functions that are called."""
        integer, text = ctypes.c_int, ctypes.c_char_p
        library = self._library
        library.espeak_Initialize.argtypes = [integer, integer, text, integer]
        library.espeak_SetSynthCallback.argtypes = [_CALLBACK]
        library.espeak_SetVoiceByName.argtypes = [text]
        library.espeak_SetParameter.argtypes = [integer, integer, integer]
        library.espeak_Synth.argtypes = [
            text,
            ctypes.c_size_t,
            ctypes.c_uint,
            integer,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_ng_SetRandSeed.restype = None

    def _receive(self, samples, count: int, events) -> int:
        """Called by the library with each piece of speech; the memory is its own, so copy at once."""
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # 1 would stop the synthesis

    def check(self, voice: Voice) -> None:
        """Refuse a variant that does not exist: the library itself would ignore it in silence."""
        if voice.variant not in self._variants:
            known = ", ".join(sorted(self._variants))
            raise SpeechError(f"espeak-ng has no variant {voice.variant!r}; it has {known}.")

    def speak(self, text: str, voice: Voice, *, seed: int) -> np.ndarray:
        """Speak ``text``.

        Returns
        -------
        (samples,) int16 at ``self.sample_rate`` Hz, the same for the same arguments whatever came before.

        Raises
        ------
        SpeechError : no such voice, or the child process failed.
        """
        self.check(voice)
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # The child calls the library and writes to a pipe; it needs none of the parent's threads.
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 4  # what an exception leaves: it must not escape into the parent's code, of which this is a copy
            try:
                os.close(reader)
                code = self._speak_into(text, voice, seed, writer)
            finally:
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            data = stream.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status or not data:
            raise SpeechError(f"espeak-ng could not speak {text!r} as {voice.accent}+{voice.variant} (code {status}).")
        return np.frombuffer(data, np.int16)

    def _speak_into(self, text: str, voice: Voice, seed: int, writer: int) -> int:
        """The child's work: speak, and write the samples to the pipe; returns its exit code."""
        library = self._library
        library.espeak_ng_SetRandSeed(seed % 2**31)
        if library.espeak_SetVoiceByName(f"{voice.accent}+{voice.variant}".encode()):
            return 2
        for name, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_PITCH_RANGE, voice.pitch_range)):
            library.espeak_SetParameter(name, value, 0)
        raw = text.encode() + b"\0"
        if library.espeak_Synth(raw, len(raw), 0, _BY_CHARACTER, 0, _TEXT_UTF8, None, None):
            return 3
        library.espeak_Synchronize()
        with os.fdopen(writer, "wb") as stream:
            stream.write(b"".join(self._chunks))
        return 0
