"""What the site says of itself: `slurm/site.env`, or the file that MEGAMM_SITE names, as bash reads it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from megamm.core.errors import ConfigError

_TIMEOUT_SECONDS = 30.0
# Bash sets these by itself.
_OWN = frozenset({"_", "SHLVL", "PWD", "OLDPWD", "BASH_EXECUTION_STRING"})


def site_file(home: Path) -> Path | None:
    """The site's settings, which the job reads as well; None where there are none.

    Raises:
        ConfigError: MEGAMM_SITE names no file.
    """
    named = os.environ.get("MEGAMM_SITE")
    path = Path(named) if named else home / "slurm" / "site.env"
    if path.is_file():
        return path
    if named:
        raise ConfigError(f"MEGAMM_SITE={named} is not a file; copy slurm/site.env.example and name the copy")
    return None


def site_environment(path: Path | None) -> dict[str, str]:
    """Variables that the site's settings set or change.

    Raises:
        ConfigError: Bash cannot read the file; says what it says.
    """
    if path is None:
        return {}
    # With checkwinsize bash adds the size of a terminal.
    program = 'shopt -u checkwinsize; set -ea; source "$1" >&2; env -0'
    command = ["bash", "-c", program, "site", str(path.resolve())]
    try:
        answer = subprocess.run(command, env=dict(os.environ), capture_output=True, check=False, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{path} did not end within {_TIMEOUT_SECONDS:.0f} s; it should only set variables") from None
    if answer.returncode:
        said = answer.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError(f"{path} cannot be read by bash: {said[-1] if said else f'it ended with code {answer.returncode}'}")
    entries = (entry.decode(errors="surrogateescape").partition("=") for entry in answer.stdout.split(b"\0") if entry)
    return {name: value for name, _, value in entries if name not in _OWN and os.environ.get(name) != value}
