"""A power cut at every operation of a save: what was never synced may be gone, and no checkpoint may need it.

A killed process loses nothing that it had written, because the kernel still holds it; a power cut loses the kernel as well. So a
model of the disk goes along with every save. It must keep a file's bytes once the file was synced, and a folder's names once the
folder was. Of all that came later, each part is there after the cut or not, as drawn: names in any order, files whole, torn, empty
or full of zeros.

Source: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014 (what a file system may do to unsynced operations).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.ranks import judged
from benchmarks.drills.saving import in_memory, names_in, problem_with, save_alone, state_at
from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.fence import Fence
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.io import Buffer, Io
from megamm.checkpoint.manifest import read_manifest, step_folder
from megamm.engine.distributed import World

NUM_RANKS = 2
# How often the rest is drawn for each operation.
_DRAWS: dict[Size, int] = {"quick": 1, "normal": 6, "full": 60}


class Cut(BaseException):
    """The power went."""


@dataclass(eq=False)
class Node:
    """A file (`children` is None) or a folder, as it is now and as the disk must have it.

    Attributes:
        content: Bytes of a file.
        synced: Those that were synced; None for a file that never was.
        children: Names of a folder.
        kept: Its names when it was synced last.
        pending: What happened to its names since then, in order: (name, node), None for one that was taken away.
    """

    content: bytes = b""
    synced: bytes | None = None
    children: dict[str, Node] | None = None
    kept: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, names: dict[str, Node | None]) -> None:
        """Names that change in one step, such as both of a rename."""
        assert self.children is not None, "a folder"
        for name, node in names.items():
            if node is None:
                self.children.pop(name, None)
            else:
                self.children[name] = node
        self.pending.append(names)

    def sync(self) -> None:
        """What a file system must keep from now on."""
        self.synced = self.content
        self.kept, self.pending = dict(self.children or {}), []


class PoweredIo(Io):
    """The real operations below `root`, with the model beside them; the power goes before operation `at`."""

    def __init__(self, root: Path, at: int = -1):
        self.num_begun = 0
        self._root = root
        self._at = at
        self.disk = _model_of(root)
        _sync_all(self.disk)

    @contextmanager
    def create(self, path: Path) -> Iterator[FileIO]:
        """Name it now; the disk may not."""
        self._begin()
        with super().create(path) as file:
            self._node(path.parent).change({path.name: Node()})
            yield file

    def write(self, file: FileIO, block: Buffer) -> None:
        """Put it into memory; the disk may not have it."""
        self._begin()
        super().write(file, block)
        self._node(Path(file.name)).content += bytes(block)

    def sync(self, file: FileIO) -> None:
        """Keep its bytes from now on."""
        self._begin()
        self._node(Path(file.name)).sync()

    def make_folder(self, path: Path) -> None:
        """Name it and its missing parents now."""
        self._begin()
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            self._node(folder.parent).change({folder.name: Node(children={})})
        super().make_folder(path)

    def sync_folder(self, path: Path) -> None:
        """Keep its names from now on."""
        self._begin()
        self._node(path).sync()

    def rename(self, source: Path, target: Path) -> None:
        """Change both names in one step."""
        self._begin()
        super().rename(source, target)
        self._node(source.parent).change({source.name: None, target.name: self._node(source)})

    def point(self, link: Path, name: str) -> None:
        """Leave it out: it is for people, and no checkpoint depends on it."""
        self._begin()

    def remove_folder(self, path: Path) -> None:
        """Take its files and its name away, one by one."""
        self._begin()
        super().remove_folder(path)
        folder = self._node(path)
        for name in list(folder.children or {}):
            folder.change({name: None})
        self._node(path.parent).change({path.name: None})

    def _begin(self) -> None:
        if self.num_begun == self._at:
            raise Cut
        self.num_begun += 1

    def _node(self, path: Path) -> Node:
        node = self.disk
        for name in path.relative_to(self._root).parts:
            assert node.children is not None, "a folder"
            node = node.children[name]
        return node


def cut_power(size: Size, folder: Path) -> Tally:
    """Cut it at every operation of a run's first save and of one that replaces another, and go on from what is left."""

    def judge(world: World, memory: Path) -> list[str]:
        problems = []
        for begun in (0, 2):
            whole = _count(memory / f"counted-{begun}", begun)
            for at in range(whole + 1):
                # What was saved must be there whatever is drawn, so it is drawn more often.
                for draw in range(_DRAWS[size] * (8 if at == whole else 1)):
                    run = memory / f"{begun}-{at}-{draw}"
                    problem = _cut(run, begun, at, random.Random(f"{begun} {at} {draw}"), world, is_over=at == whole)
                    problems.append(problem and f"{begun} checkpoints, operation {at} of {whole}, draw {draw}: {problem}")
        return problems

    with in_memory() as memory:
        problems = judged(lambda world: judge(world, memory))
    return Tally.of(problems, f"a run's first save, and one that replaces another; {_DRAWS[size]} draws of what was not synced, each")


def _begin_run(run: Path, num_checkpoints: int) -> None:
    run.mkdir(parents=True)
    for number in range(num_checkpoints):
        save_alone(run, state_at(5 * (number + 1)), NUM_RANKS, hold=Hold(Fence(1)))


def _count(run: Path, begun: int) -> int:
    _begin_run(run, begun)
    io = PoweredIo(run)
    save_alone(run, state_at(20), NUM_RANKS, hold=Hold(Fence(1)), io=io)
    return io.num_begun


def _cut(run: Path, begun: int, at: int, rng: random.Random, world: World, *, is_over: bool) -> str:
    _begin_run(run, begun)
    io = PoweredIo(run, at)
    try:
        save_alone(run, state_at(20), NUM_RANKS, hold=Hold(Fence(1)), io=io)
        if not is_over:
            return "the power was not cut"
    except Cut:
        pass
    after = run.with_name(f"{run.name}-after")
    _write(io.disk, after, rng)
    choice = newest_good(after / "checkpoints", world, hold=Hold(Fence(2)))
    found = 0 if choice.folder is None else read_manifest(choice.folder).step
    if choice.damaged or found not in ({20} if is_over else {5 * begun, 20}):
        return f"step {found} was chosen, damaged {choice.damaged}"
    problem = problem_with(choice.folder, state_at(found)) if choice.folder is not None else ""
    save_alone(after, state_at(30), NUM_RANKS, hold=Hold(Fence(2)))
    expected = [step_folder(step) for step in (found, 30) if step]
    return problem or ("" if names_in(after) == expected else f"left in the folder: {names_in(after)}")


def _model_of(path: Path) -> Node:
    if path.is_dir():
        return Node(children={child.name: _model_of(child) for child in path.iterdir() if not child.is_symlink()})
    return Node(path.read_bytes())


def _sync_all(node: Node) -> None:
    for child in (node.children or {}).values():
        _sync_all(child)
    node.sync()


def _write(node: Node, path: Path, rng: random.Random) -> None:
    """What is on the disk after the cut."""
    if node.children is None:
        torn = [b"", bytes(len(node.content)), node.content, node.content[: rng.randint(0, len(node.content))]]
        path.write_bytes(rng.choice(torn) if node.synced is None else node.synced)
        return
    path.mkdir()
    names: dict[str, Node | None] = dict(node.kept)
    # As a journal keeps it, in order up to some point; or any of it, as others may.
    upto = rng.randint(0, len(node.pending))
    is_kept = [at < upto for at in range(len(node.pending))] if rng.random() < 0.5 else [rng.random() < 0.5 for _ in node.pending]
    for step, kept in zip(node.pending, is_kept, strict=True):
        names |= step if kept else {}
    for name, child in names.items():
        if child is not None:
            _write(child, path / name, rng)


DRILLS = (Drill("a power cut at every operation of a save", cut_power),)
