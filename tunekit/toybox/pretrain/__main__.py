"""`python -m tunekit.toybox.pretrain`: makes the whole toybox from nothing, stage by stage.

Every stage resumes where it was stopped; a finished stage is not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

STAGES = (
    "pictures",
    "clip",
    "vae",
    "judge",
    "subject",
    "clip-vision",
    "clip-attributes",
    "unet",
    "unet-marks",
    "vae-decoder",
    "assemble",
    "assess",
)
COUNTS = {
    "full": (40_000, 11),
    "core": (64_000, 12),
    "same": (24_000, 13),
    "odd": (12_000, 14),
    "marked": (32_000, 15),
}
STEPS = {
    "clip": 550,
    "clip-vision": 900,
    "clip-attributes": 1_600,
    "vae": 4_000,
    "judge": 900,
    "subject": 700,
    "unet": 2_790,
    "unet-marks": 3_000,
    "vae-decoder": 1_800,
}


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0 and at most 1")
    return share


def _part(whole: int, scale: float, least: int = 1) -> int:
    """`scale` of a count, at least `least`."""
    return max(least, round(whole * scale))


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tunekit.toybox.pretrain", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".pretrain"),
                        help="folder for pictures, caches and checkpoints")  # fmt: skip
    parser.add_argument("--only", choices=STAGES, action="append",
                        help="run only this stage (may be given again)")  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="processes for unet (gloo)")
    parser.add_argument("--steps", type=int, help="steps of the one stage named by --only")
    parser.add_argument("--target", type=Path, help="where the finished weights go "
                        "(default: tunekit/toybox/weights)")  # fmt: skip
    parser.add_argument("--scale", type=_share, default=1.0, help="share of the pictures and "
                        "steps, for a trial run (0 to 1; default: 1)")  # fmt: skip
    parser.add_argument("--shipped", action="store_true", help="begin with the shipped weights: "
                        "for --only a late stage, without the ones before it")  # fmt: skip
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale of assess")
    return parser.parse_args(arguments)


def _count(kind: str, scale: float) -> tuple[int, int]:
    """How many pictures of a kind, and their seed; `same` come in fours."""
    whole, seed = COUNTS[kind]
    return 4 * _part(whole // 4, scale, least=4), seed


def _unet(rank: int, name: str, work: Path, steps: int, ranks: int, scale: float) -> None:
    import torch

    from tunekit.toybox.pretrain import unet
    from tunekit.toybox.pretrain.pictures import pictures

    if ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{(work / 'rendezvous').absolute()}", rank=rank,
            world_size=ranks,
        )  # fmt: skip
        torch.set_num_threads(1)
    kind = "core" if name == "unet" else "marked"
    count, seed = _count(kind, scale)
    data = unet.encode(work, pictures(work / "pictures", kind, count, seed, 1), kind)
    if name == "unet":
        unet.train(work, data, steps, rank=rank, ranks=ranks)
    else:
        unet.train(work, data, steps, lr=1.2e-3, seed=15, rank=rank, ranks=ranks,
                   stage_name=name, begin=work / "unet")  # fmt: skip
    if ranks > 1:
        torch.distributed.destroy_process_group()


def _stage(name: str, work: Path, options: argparse.Namespace) -> None:
    from tunekit.toybox.pretrain.pictures import Pictures, pictures

    steps = options.steps or _part(STEPS.get(name, 0), options.scale)

    def rendered(kind: str) -> Pictures:
        count, seed = _count(kind, options.scale)
        return pictures(work / "pictures", kind, count, seed, os.cpu_count() or 1)

    if name == "pictures":
        for kind in COUNTS:
            rendered(kind)
    elif name == "clip":
        from tunekit.toybox.pretrain import clip, words

        data = rendered("full")
        if not (work / "tokenizer").exists():
            words.train_tokenizer([f["caption"] for f in data.facts], work / "tokenizer")
        clip.train(work, data, steps)
    elif name == "clip-vision":
        from tunekit.toybox.pretrain import clip

        clip.train_vision(work, rendered("full") + rendered("odd"), steps)
    elif name == "clip-attributes":
        from tunekit.toybox.pretrain import attributes

        data = rendered("full") + rendered("odd") + rendered("same")
        wordings = _part(len(attributes.WORDINGS), options.scale)
        attributes.train(work, data, steps, attributes.WORDINGS[:wordings])
    elif name in ("vae", "vae-decoder"):
        from tunekit.toybox.pretrain import vae

        train = vae.train if name == "vae" else vae.train_decoder
        train(work, rendered("full"), steps)
    elif name in ("judge", "subject"):
        from tunekit.toybox.pretrain import judge

        if name == "judge":
            judge.train_judge(work, rendered("full"), steps)
        else:
            judge.train_subject(work, rendered("same"), steps)
    elif name in ("unet", "unet-marks"):
        _unet_processes(name, work, steps, options.processes, options.scale)
    else:
        _finish(name, work, options)


def _unet_processes(name: str, work: Path, steps: int, processes: int, scale: float) -> None:
    if processes == 1:
        _unet(0, name, work, steps, 1, scale)
        return
    from torch.multiprocessing.spawn import spawn

    (work / "rendezvous").unlink(missing_ok=True)
    spawn(_unet, (name, work, steps, processes, scale), processes)  # type: ignore[no-untyped-call]


def _finish(name: str, work: Path, options: argparse.Namespace) -> None:
    from tunekit.toybox import WEIGHTS

    target = options.target or WEIGHTS
    if name == "assemble":
        from tunekit.toybox.pretrain import unet
        from tunekit.toybox.pretrain.assemble import assemble

        unet.save_running(work)
        assemble(work, target)
    else:
        from tunekit.toybox.pretrain.assess import assess

        drawn = _part(256, options.scale, least=8)
        table = assess(target, work, drawn, guidance=options.guidance)
        for row in ("bar", "rendered", "reconstructed", "drawn"):
            print(f"{row:14}", *(f"{k} {v:5.1f}" for k, v in table[row].items()))


def _begin(work: Path, scale: float) -> None:
    """Make the folder; stop where another scale began it, since checkpoints are not comparable."""
    note = work / "scale.txt"
    begun = scale
    if note.exists():
        begun = float(note.read_text())
    elif work.exists() and any(work.iterdir()):
        begun = 1.0
    if begun != scale:
        sys.exit(f"{work} was begun at --scale {begun:g}: give that, or another --work")
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{scale:g}\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the stages asked for, in order."""
    options = _arguments(sys.argv[1:] if arguments is None else arguments)
    if options.scale < 1 and options.target is None:
        sys.exit("a trial run (--scale) would replace the shipped weights: give it a --target")
    # parts are read out of larger models on purpose; transformers would list what it leaves
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _begin(options.work, options.scale)
    if options.shipped:
        from tunekit.toybox.pretrain.assemble import unpack

        unpack(options.work)
    for name in options.only or STAGES:
        print(f"== {name}", flush=True)
        _stage(name, options.work, options)


if __name__ == "__main__":
    main()
