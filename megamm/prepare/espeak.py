"""Speech from espeak-ng's library, called through ctypes in a process of its own.

The library keeps its state (phases, flutter, noise) from one utterance to the next and for ever, so only a fresh process with a seeded
noise source renders the same samples every time; and a crash in it is an error here, not the end of the caller.

Source: espeak-ng 1.52, `speak_lib.h`; the wheel `espeakng-loader` ships the library and its voices.
"""

from __future__ import annotations

import ctypes
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from megamm.core.errors import ConfigError, DataError

_SYNCHRONOUS_RETRIEVAL = 2
_DO_NOT_EXIT = 0x8000
_UTF8 = 1
_RATE, _PITCH = 1, 3

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Utterance:
    """What to say and how.

    Attributes:
        text: The words.
        accent: Language of espeak-ng, such as `en-us`.
        variant: Voice variant of espeak-ng, such as `f2`.
        rate: Words a minute.
        pitch: From 0 to 100, relative to the variant's range.
    """

    text: str
    accent: str
    variant: str
    rate: int
    pitch: int

    @property
    def voice(self) -> str:
        """Accent and variant in espeak-ng's own notation."""
        return f"{self.accent}+{self.variant}"


def render(utterances: Sequence[Utterance]) -> tuple[int, list[np.ndarray]]:
    """Speak all utterances, in order; the same list gives the same samples.

    Returns:
        The sampling rate in hertz, and the sound of each utterance as int16[samples].

    Raises:
        ConfigError: espeakng-loader is not installed, its library does not start, or it has no such voice.
        DataError: An utterance gave no sound.
    """
    if find_spec("espeakng_loader") is None:
        raise ConfigError("rendering speech needs espeakng-loader; install it with `pip install 'megamm[quickstart]'`")
    child = subprocess.run(
        [sys.executable, "-c", "from megamm.prepare.espeak import serve; serve()"],
        input=json.dumps([asdict(utterance) for utterance in utterances]).encode(),
        capture_output=True,
        check=False,
    )
    if child.returncode != 0:
        last_line = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConfigError(f"espeak-ng ended with status {child.returncode}: {last_line.rpartition('Error: ')[2]}")
    stream = io.BytesIO(child.stdout)
    rate_hz = int(np.load(stream))
    sounds = [np.load(stream) for _ in utterances]
    for utterance, sound in zip(utterances, sounds, strict=True):
        if not sound.any():
            raise DataError(f"espeak-ng gave no sound for {utterance.text!r} by {utterance.voice}; use another voice")
    return rate_hz, sounds


def serve() -> None:
    """The child process: utterances as JSON on standard input, the rate and the sounds as npy on standard output."""
    utterances = [Utterance(**fields) for fields in json.load(sys.stdin)]
    with tempfile.TemporaryDirectory() as folder:
        speaker = _Speaker(Path(folder))
        np.save(sys.stdout.buffer, np.array(speaker.rate_hz))
        for utterance in utterances:
            np.save(sys.stdout.buffer, speaker.say(utterance), allow_pickle=False)


class _Speaker:
    """The library, started. It is global to its process, so there is one at most."""

    def __init__(self, folder: Path) -> None:
        import espeakng_loader

        self._variants = Path(espeakng_loader.get_data_path(), "voices", "!v")
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        # espeak-ng cuts its data path at 160 characters; a link gives every installation a short one.
        data = folder / "espeak-ng-data"
        data.symlink_to(espeakng_loader.get_data_path())
        self.rate_hz = self._library.espeak_Initialize(_SYNCHRONOUS_RETRIEVAL, 0, str(data).encode(), _DO_NOT_EXIT)
        if self.rate_hz <= 0:
            raise ConfigError(f"it cannot read {espeakng_loader.get_data_path()}; install espeakng-loader again")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._blocks: list[np.ndarray] = []
        self._callback = _Callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, utterance: Utterance) -> np.ndarray:
        """The sound of an utterance, int16[samples]."""
        # The library falls back to the plain voice of the accent, with status 0, when it does not know a variant.
        if not (self._variants / utterance.variant).is_file():
            raise ConfigError(f"it has no voice variant {utterance.variant!r}; the variants are files in {self._variants}")
        self._call("SetVoiceByName", utterance.voice.encode(), what=f"voice {utterance.voice!r}")
        self._call("SetParameter", _RATE, utterance.rate, 0, what=f"rate {utterance.rate}")
        self._call("SetParameter", _PITCH, utterance.pitch, 0, what=f"pitch {utterance.pitch}")
        text = utterance.text.encode() + b"\0"
        self._blocks.clear()
        self._call("Synth", text, ctypes.c_size_t(len(text)), 0, 0, 0, _UTF8, None, None, what=f"text {utterance.text!r}")
        self._call("Synchronize", what="waiting for the sound")
        return np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.int16)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], num_samples: int, _events: int) -> int:
        if samples and num_samples > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    def _call(self, function: str, *arguments: object, what: str) -> None:
        status = getattr(self._library, f"espeak_{function}")(*arguments)
        if status != 0:
            raise ConfigError(f"it refuses {what} with status {status}; choose another")
