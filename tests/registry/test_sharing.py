"""A registry that the users of a group share: what one makes shuts out no other, whatever the umask."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quill import fsio
from quill.cli.app import main
from quill.errors import LockedError
from quill.registry import locks, share
from quill.registry.store import Registry

# Numbers that no user has.
ANNA, BERT, STRANGER = 61001, 61002, 61003
GROUP, OTHERS = 62001, 62002
TEXT = "the tide is out, and the boats lie on the sand\n" * 60
TINY = [
    *("--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--batch-size=2", "--max-iters=2"),
    *("--eval-interval=1", "--eval-iters=1", "--warmup-iters=0", "--device=cpu", "-q"),
]


@contextmanager
def user(number: int, umask: int, group: int = GROUP) -> Iterator[None]:
    """Be another user of this computer for the length of the context, without any privilege."""
    before, mask = os.getgroups(), os.umask(umask)
    os.setgroups([group])
    os.setegid(group)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
        os.umask(mask)


TRAIN = ["train", "notes.txt", "--name", "n", *TINY]
# What two users do in turns, and what each of them needs of the other.
TURNS = [
    TRAIN,
    ["sample", "n", "-n", "3", "--seed", "1"],
    ["alias", "set", "n:v1", "champion"],
    [*TRAIN, "--new-version", "--seed=2"],
    ["prepare", "notes.txt", "--force"],
    ["alias", "rm", "n:champion"],
    ["prepare", "notes.txt", "--force"],
    ["mv", "n", "m"],
    ["rm", "m:v2", "-y"],
    ["gc", "--older-than", "0", "-y"],
    ["verify", "m"],
    ["list", "--all-versions"],
    ["rm", "m", "data:notes", "-y"],
]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have everything imported by a user who can read it: the interpreter may be in a private folder."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("QUILL_REGISTRY", str(folder / "weights"))
        (folder / "notes.txt").write_text(TEXT)
        for command in [*TURNS, ["registry", "share", "--json"], ["list"]]:
            assert main(command) == 0, command
        assert main(["list", "--registry", str(folder / "notes.txt")]) == 7


@pytest.fixture
def place(rehearsed: None) -> Iterator[Path]:
    """An empty folder that every user can reach."""
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("only root can act as other users")
    folder = Path(tempfile.mkdtemp(prefix="quill-shared-"))
    folder.chmod(0o755)
    with user(ANNA, 0o022):
        if not os.access(folder, os.X_OK):
            pytest.skip(f"other users cannot reach {folder}")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def shared(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is shared as `git init --shared` does it; the registry and the datasets go there."""
    place.chmod(0o2770)
    os.chown(place, 0, GROUP)
    monkeypatch.setenv("QUILL_REGISTRY", str(place / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    (place / "notes.txt").write_text(TEXT)
    (place / "notes.txt").chmod(0o644)
    monkeypatch.chdir(place)
    return place


def closed(root: Path) -> list[str]:
    """What is not open to the group."""
    found = []
    for path in root.rglob("*"):
        mode = path.lstat().st_mode
        wanted = 0o2070 if stat.S_ISDIR(mode) else 0o060
        if path.lstat().st_gid != GROUP or mode & wanted != wanted:
            found.append(f"{path.relative_to(root)} {oct(mode)}")
    return found


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_f66_two_users_publish_rename_and_remove_in_turns(shared: Path, fill, umask: int) -> None:
    registry = Registry(shared / "weights")

    def publish(name: str) -> None:
        draft = registry.begin(name)
        with locks.hold(registry.root, name):
            draft.take()
            fill(draft)
            draft.open_log("train.log").close()
            draft.save_state(1, lambda place: fsio.write_bytes(place / "x", b"x"))
            draft.publish(parameters=64)

    for who, name in ((ANNA, "a"), (BERT, "a"), (ANNA, "b")):
        with user(who, umask):
            publish(name)
    assert closed(registry.root) == []
    commands = ("alias set a:v1 champion", "mv a c", "rm c:v2 -y", "alias rm c:champion", "rm c b -y", "list")
    for i, command in enumerate(commands):
        with user((BERT, ANNA)[i % 2], umask):
            assert main(command.split()) == 0
    # A run that one of them left unfinished is resumed and published by the other.
    with user(ANNA, umask):
        draft = registry.begin("d")
        draft.take()
        fill(draft)
        draft.open_log("train.log").close()
    with user(BERT, umask), locks.hold(registry.root, "d"):
        draft = registry.unfinished("d")
        draft.take()
        draft.open_log("train.log").append("resumed")
        assert draft.publish(parameters=64).reference == "d:v1"
    assert closed(registry.root) == []


def test_f66_leftovers_of_one_user_are_collected_by_another(shared: Path) -> None:
    registry = Registry(shared / "weights")
    with user(ANNA, 0o077):
        registry.begin("a")
        for folder in (registry.root, registry.root / "a"):
            child = os.fork()
            if child == 0:
                with fsio.scratch(folder) as left:
                    (left / "x").touch()
                    os._exit(9)
            os.waitpid(child, 0)
    assert len(list(registry.root.rglob(".tmp-*"))) == 2
    with user(BERT, 0o077):
        assert main(["gc", "--older-than", "0", "-y"]) == 0
    assert list(registry.root.rglob(".tmp-*")) == []


def test_f66_a_lock_of_one_user_is_seen_by_another(shared: Path) -> None:
    registry = Registry(shared / "weights")
    with user(ANNA, 0o077), locks.hold(registry.root, "a"):
        pass
    fd = os.open(locks.path_of(registry.root, "a"), os.O_RDWR)
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX)
        with user(BERT, 0o077), pytest.raises(LockedError), locks.hold(registry.root, "a"):
            pass
    finally:
        os.close(fd)
    with user(BERT, 0o077), locks.hold(registry.root, "a"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_f66_every_command_of_two_users(shared: Path, umask: int, capsys: pytest.CaptureFixture[str]) -> None:
    for i, command in enumerate(TURNS):
        with user((ANNA, BERT)[i % 2], umask):
            assert main(command) == 0, (command, capsys.readouterr().err)
    assert closed(shared / "weights") == []
    assert closed(shared / "data") == []


def test_f66_a_private_registry_stays_private(place: Path, fill) -> None:
    place.chmod(0o777)
    registry = Registry(place / "weights")
    with user(ANNA, 0o077):
        draft = registry.begin("a")
        fill(draft)
        draft.publish(parameters=64)
    assert {p.stat().st_mode & 0o077 for p in [registry.root, *registry.root.rglob("*")]} == {0}
    with user(BERT, 0o022):
        assert main(["list", "--registry", str(registry.root)]) == 7


def test_f66_a_registry_is_shared_by_a_command(place: Path, fill, capsys: pytest.CaptureFixture[str]) -> None:
    place.chmod(0o777)
    registry = Registry(place / "weights")
    with user(ANNA, 0o077):
        fill(registry.begin("a"))
        registry.unfinished("a").publish(parameters=64)
        assert main(["registry", "share", "--registry", str(registry.root), "--group", str(GROUP)]) == 0
        again = ["registry", "share", "--registry", str(registry.root), "--json"]
        capsys.readouterr()
        assert main(again) == 0
        assert '"changed": 0' in capsys.readouterr().out
    assert closed(registry.root) == []
    with user(BERT, 0o077):
        fill(registry.begin("a"))
        registry.unfinished("a").publish(parameters=64)
    assert closed(registry.root) == []
    with user(STRANGER, 0o022, OTHERS):
        assert main(["list", "--registry", str(registry.root)]) == 7
        assert main(["registry", "share", "--registry", str(registry.root)]) == 7


def test_f66_files_of_others_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place.chmod(0o777)
    with user(ANNA, 0o022):
        (place / "weights").mkdir()
        (place / "weights").chmod(0o777)
    with user(BERT, 0o022):
        (place / "weights" / "theirs").mkdir()
    with user(ANNA, 0o022):
        done = share.share([place / "weights"])
    assert done.refused == [place / "weights" / "theirs"]


def test_f14_sharing_follows_no_link(place: Path) -> None:
    outside = place / "outside"
    outside.write_text("private")
    outside.chmod(0o600)
    root = place / "weights"
    root.mkdir()
    (root / "link").symlink_to(outside)
    share.share([root], str(GROUP))
    assert (outside.stat().st_mode & 0o777, outside.stat().st_gid) == (0o600, 0)


def test_a_group_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--registry", str(tmp_path / "weights")]
    assert main(["registry", "share", "--group", "no-such-group", *where]) == 2
    assert "no group named 'no-such-group'" in capsys.readouterr().err
    assert not (tmp_path / "weights").exists()
