"""Makes sources of the paths that the user gives: files, and folders of files."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import DataError
from .formats import holds_a_corpus, unread_format, way_out
from .sources import JSON_LINES, JsonLines, Source, TextFile, is_text, why_not_json_lines
from .token_files import TOKEN_SUFFIXES, TokenFile

_MOST_NAMES = 3
# reasons why something in a folder is not read, in the singular and in the plural
_NOT_TEXT = "file that is not UTF-8 text", "files that are not UTF-8 text"
_HIDDEN = "hidden file or folder", "hidden files and folders"
_LINK = (
    "link to a folder (give the folder by name)",
    "links to folders (give the folders by name)",
)
_SPECIAL = "pipe, device or broken link", "pipes, devices or broken links"
_TOKENS = "file of token ids (give it by name)", "files of token ids (give them by name)"
_RUN = "run's folder", "runs' folders"
_PACKED = "compressed file (unpack it first)", "compressed files (unpack them first)"
_JSON = (
    "JSON file that is not one object a line with the text field",
    "JSON files that are not one object a line with the text field",
)


class PassedOver:
    """The files and folders below a folder that are not read, by reason."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[tuple[str, str], list[Path]] = {}

    def add(self, reason: tuple[str, str], path: Path) -> None:
        self._paths.setdefault(reason, []).append(path)

    def notes(self) -> list[str]:
        """A line for each reason."""
        return [self._note(reason) for reason in sorted(self._paths)]

    def _note(self, reason: tuple[str, str]) -> str:
        paths = self._paths[reason]
        names = [str(path.relative_to(self.folder)) for path in paths[:_MOST_NAMES]]
        more = f" and {len(paths) - len(names)} more" if len(paths) > len(names) else ""
        one, several = reason
        what = one if len(paths) == 1 else several
        return f"{self.folder}: skipped {len(paths)} {what}: {', '.join(names)}{more}"


def open_path(
    path: Path, text_field: str, exclude: Collection[Path], bin_dtype: str | None = None
) -> tuple[list[Source], list[str]]:
    """The sources behind a path: one for a file; for a folder one for each file, in sorted order.

    Args:
        path: a file or a folder.
        text_field: the field of JSON lines to read.
        exclude: real paths of folders that are no sources: the output, and the folder it is made in.
        bin_dtype: as TokenFile's; for a single file only.

    Returns: the sources, and notes on the files that are not read, a line each.

    Raises:
        DataError: nothing can be read there, or a file has a format that is not read here.
    """
    if path.is_dir():
        if _is_run(path):
            raise DataError(
                f"{path}: is a run's folder, whose settings and records are no corpus; give the folder of "
                "the text"
            )
        return _open_folder(path, text_field, exclude)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_file():
        raise DataError(
            f"{path}: not a regular file; sources are read twice, so write it to a file"
        )
    if path.suffix.lower() in TOKEN_SUFFIXES:  # first: ids may begin with any bytes
        tokens = TokenFile(path, bin_dtype)
        return [tokens], [tokens.note] if tokens.note else []
    if form := unread_format(path):
        raise DataError(way_out(path, form))
    if path.suffix.lower() == ".json" and (reason := why_not_json_lines(path)):
        raise DataError(f"{path}: {reason}, or name it .txt to take it as plain text")
    return [_text_source(path, text_field)], []


def _text_source(path: Path, text_field: str) -> Source:
    is_json = path.suffix.lower() in (*JSON_LINES, ".json")
    return JsonLines(path, text_field) if is_json else TextFile(path)


def _open_folder(
    folder: Path, text_field: str, exclude: Collection[Path]
) -> tuple[list[Source], list[str]]:
    sources: list[Source] = []
    passed = PassedOver(folder)
    for path in walk(folder, exclude, passed=passed):
        if reason := _why_not(path, text_field):
            passed.add(reason, path)
        else:
            sources.append(_text_source(path, text_field))
    if not sources:
        raise DataError(
            "; ".join([f"{folder}: no UTF-8 text files in this folder", *passed.notes()])
        )
    return sources, passed.notes()


def _why_not(path: Path, text_field: str) -> tuple[str, str] | None:
    """Why a file of a folder is not read; None if it is."""
    if path.suffix.lower() in TOKEN_SUFFIXES:
        return _TOKENS
    if form := unread_format(path):
        if holds_a_corpus(path, form):
            # the readable files beside it are not the corpus
            raise DataError(way_out(path, form))
        return _PACKED if form.suffixes else _NOT_TEXT
    if not is_text(path):
        return _NOT_TEXT
    if path.suffix.lower() == ".json" and why_not_json_lines(path, text_field):
        return _JSON
    return None


def walk(
    folder: Path,
    exclude: Collection[Path],
    skip_folders: Collection[str] = (),
    passed: PassedOver | None = None,
) -> Iterator[Path]:
    """The regular files below a folder, in the same order on every machine.

    Hidden files and folders, links to folders, folders of runs, and files that are not regular are
    passed over.

    Args:
        folder: where to begin.
        exclude: real paths of folders that are left out.
        skip_folders: names of folders that are left out.
        passed: collects the files and folders that are passed over.

    Raises:
        DataError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot list: {error.strerror}") from error

    passed = passed or PassedOver(folder)
    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [
            name
            for name in sorted(folders)
            if name not in skip_folders
            and Path(os.path.realpath(os.path.join(root, name))) not in exclude
            and not _passes_folder(Path(root, name), passed)
        ]
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith("."):
                passed.add(_HIDDEN, path)
            elif not path.is_file():
                passed.add(_SPECIAL, path)
            else:
                yield path


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file() and (folder / "checkpoints").is_dir()


def _passes_folder(path: Path, passed: PassedOver) -> bool:
    """Whether a folder is passed over; if so, it is added to `passed`."""
    if path.name.startswith("."):
        passed.add(_HIDDEN, path)
    elif path.is_symlink():
        passed.add(_LINK, path)
    elif _is_run(path):
        passed.add(_RUN, path)
    else:
        return False
    return True
