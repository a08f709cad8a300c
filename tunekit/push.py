"""What a finished run exported, sent to a repository of the Hugging Face Hub.

Only the export folder is sent: adapter files, files of words, the model card and its pictures. The
recipe and the samples stay here; what of the recipe may travel is in the files' metadata.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit import hub, runs
from tunekit.errors import UserError
from tunekit.runfolder import EXPORT, RunFolder

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


CARD = "README.md"


@dataclass(frozen=True)
class Push:
    """What is sent, or would be. files: by their names in the repository, with bytes.

    said: what a reader of the card will miss. url: of the repository once it was sent, else None.
    """

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]
    said: tuple[str, ...]
    url: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"folder": str(self.folder), "said": list(self.said)}

    def lines(self) -> list[str]:
        """Return it for people."""
        whose = "a private repository" if self.private else "a public repository"
        done = f"sent to {self.url}" if self.url else f"would be sent to {self.repo}, {whose}"
        width = max(map(len, self.files))
        listed = [f"  {name.ljust(width)}  {size:,} bytes" for name, size in self.files.items()]
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes, {done}"
        nothing = [] if self.url else ["nothing was sent (--dry-run)"]
        return [f"{self.folder}:", *listed, total, *self.said, *nothing]


def push(folder: Path, repo: str, *, private: bool = False, dry_run: bool = False) -> Push:
    """Send what the run in `folder` exported to the model repository `repo` (owner/name).

    The repository is made where there is none; files of the same names there are replaced, others
    stay. dry_run: only say what would be sent. The access token is the Hub's own: $HF_TOKEN, or
    what `hf auth login` stored. Raises UserError for a run that has not finished, files that are
    not what the run wrote, a repository's name that is none, a missing token, and whatever the Hub
    refuses.
    """
    if not hub.is_id(repo):
        raise UserError(
            f"--repo: {repo} is no repository's name: write OWNER/NAME, such as me/zorp"
        )
    run = RunFolder.open(folder)
    held = [*runs.exported(folder)]
    names = {str(path.relative_to(folder / EXPORT)) for path in held}
    names |= {str(path.relative_to(folder / EXPORT)) for path in _beside(folder / EXPORT, names)}
    files = {name: (folder / EXPORT / name).stat().st_size for name in sorted(names)}
    planned = Push(folder, repo, private, files, tuple(_missing(folder / EXPORT, run)))
    if dry_run:
        return planned
    return Push(**{**vars(planned), "url": _send(planned)})


def _beside(export: Path, names: set[str]) -> list[Path]:
    """Return the card and the pictures that it shows."""
    card = export / CARD
    if not card.is_file():
        raise UserError(f"{card}: is missing: the run has not finished")
    shown = [widget["output"]["url"] for widget in _card(card).get("widget") or ()]
    for name in shown:
        if Path(name).is_absolute() or ".." in Path(name).parts or not (export / name).is_file():
            raise UserError(f"{card}: shows {name}, which is no file beside it")
    return [card, *(export / name for name in shown)]


def _card(path: Path) -> ModelCardData:
    """Return the card's front matter as the Hub reads it."""
    from huggingface_hub import ModelCard, ModelCardData

    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: the Hub cannot read it: {' '.join(str(error).split())}") from None
    assert isinstance(data, ModelCardData)
    return data


def _missing(export: Path, run: RunFolder) -> list[str]:
    """Return what the Hub's page will not say, in words."""
    data, said = _card(export / CARD), []
    if data.license is None:
        said.append(
            "the card states no licence: set export.license in the recipe, or write it into "
            f"{export / CARD}; the base's own may bind you"
        )
    if data.base_model is None:
        said.append(
            f"the card names no base: {Path(run.recipe.base.model).name} is no model of the Hub"
        )
    return said


def _send(planned: Push) -> str:
    from huggingface_hub import HfApi, errors, get_token

    if get_token() is None:
        raise UserError(
            "there is no access token: log in with `hf auth login`, or set HF_TOKEN to one that "
            "may write (https://huggingface.co/settings/tokens)"
        )
    api = HfApi()
    try:
        url = api.create_repo(planned.repo, private=planned.private, exist_ok=True)
        api.upload_folder(
            repo_id=planned.repo,
            folder_path=planned.folder / EXPORT,
            allow_patterns=[*planned.files],
            commit_message=f"Add {planned.folder.resolve().name}, trained with tunekit",
        )
    except errors.HfHubHTTPError as error:
        raise UserError(f"--repo: {planned.repo}: {_refusal(error)}") from None
    except Exception as error:  # whatever the Hub's network library raises
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{planned.repo}: could not be sent to the Hub: {line}") from error
    return str(url)


def _refusal(error: Any) -> str:
    """Return in words what the Hub answered."""
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return "the Hub does not know the access token: log in again with `hf auth login`"
    if status == 403:
        return "the access token may not write there: make one that may, or name another owner"
    line = " ".join(str(error.server_message or error).split())[:300]
    return f"the Hub refused it ({status}): {line}"
