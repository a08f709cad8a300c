"""Captions by a transformers image-text-to-text model: BLIP, Florence-2, Qwen-VL, LLaVA and kin.

How a model is spoken to is read from what its processor can do: one with task prompts is given a
task (Florence-2), one with a chat template is asked in words (Qwen-VL, LLaVA), one with neither
gets the picture and perhaps the beginning of a caption (BLIP, GIT). Always the likeliest words are
taken, so that the same picture gets the same caption.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunekit.captioners.base import Captioner, Said, Wishes, refuse_unsafe
from tunekit.errors import UserError
from tunekit.evaluation.embedders import quiet
from tunekit.modelfolder import loading
from tunekit.section import Section

if TYPE_CHECKING:
    import torch
    from PIL import Image

DESCRIBE = (
    "Describe this picture in one sentence, as the caption of an archive: who or what is there and "
    "what it does, the place, the light, the view, and how the picture is made. Answer with the "
    "caption alone."
)
DESCRIBE_AROUND = (
    "Describe this picture in one sentence, as the caption of an archive. Call the main subject "
    '"the {}" and say nothing of what makes it itself: not its shape, colours, material or '
    "markings. Describe everything else: what it does, what is around it, the place, the light, "
    "the view, and how the picture is made. Answer with the caption alone."
)


class ImageText(Captioner):
    """Lets a vision-language model describe the picture."""

    takes_instruction = True

    class Options(Section):
        """What can be set as KEY=VALUE."""

        model: str = Field(
            min_length=1,
            description="The model's folder, or a Hub id such as "
            "Salesforce/blip-image-captioning-base or Qwen/Qwen2.5-VL-3B-Instruct.",
        )
        revision: str | None = Field(
            None, min_length=1, description="Branch, tag or commit on the Hub; null: main."
        )
        task: Literal["caption", "detailed_caption", "more_detailed_caption"] | None = Field(
            None,
            description="How much a Florence-2 model says; null: detailed_caption. Others have no "
            "tasks.",
        )
        prompt: str | None = Field(
            None,
            min_length=1,
            description="The whole text the model is given, image token and all, for models that "
            "bring no chat template; {instruction} is filled in.",
        )
        max_tokens: int = Field(120, ge=1, le=1024, description="Longest caption in tokens.")
        beams: int = Field(
            1, ge=1, le=64, description="Beams of the search for the likeliest words."
        )
        dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
            "auto", description="Precision of the model; auto: as its files hold it."
        )

    def __init__(self, model: Any, processor: Any, options: Options, wishes: Wishes) -> None:
        self.model = model
        self.processor = processor
        self.options = options
        self.text = self._text(wishes)

    @classmethod
    def load(cls, options: Options, wishes: Wishes, device: torch.device) -> ImageText:
        """Load model and processor; UserError where one is missing, incomplete or a pickle."""
        import torch
        import transformers

        where = f"model {options.model}"
        refuse_unsafe(options.model, "model")
        place = str(Path(options.model).expanduser()) if Path(options.model).exists() else None
        source = place or options.model
        safe = {"trust_remote_code": False, "revision": options.revision}
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        with loading(where), quiet():
            processor = _load_processor(source, safe)
            model, found = transformers.AutoModelForImageTextToText.from_pretrained(
                source,
                use_safetensors=True,
                output_loading_info=True,
                dtype=kinds.get(options.dtype, "auto"),
                **safe,
            )
        lost = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        if lost:
            raise UserError(
                f"{where} lacks {len(lost)} of its weights, such as {min(lost)}: its captions "
                "would mean nothing; use a complete model"
            )
        model = model.eval().requires_grad_(False).to(device)
        return cls(model, processor, options, wishes)

    def describe(self, image: Image.Image) -> Said:
        """Return what the model says of the picture."""
        import torch

        given = {} if self.text is None else {"text": [self.text]}
        inputs = self.processor(images=[image], return_tensors="pt", **given)
        inputs = inputs.to(self.model.device, self.model.dtype)
        longest = self.options.max_tokens
        with torch.inference_mode(), quiet():
            tokens = self.model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, num_beams=self.options.beams
            )[0]
        asked = inputs.get("input_ids")
        echo = 0  # models without an encoder give back what they were given, before their answer
        if asked is not None and tokens[: asked.shape[1]].equal(asked[0]):
            echo = asked.shape[1]
        # The beginning of a caption belongs to it; a question does not belong to its answer.
        answer = tokens if self._begins else tokens[echo:]
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        text: str = tokenizer.decode(answer, skip_special_tokens=True)
        config = self.model.generation_config
        # Some models are made to end when there is no more room, which looks like an end.
        ended = int(tokens[-1]) in self._ends() and config.forced_eos_token_id is None
        cut = len(tokens) - echo >= longest and not ended
        return Said(_bare(text), f"cut off after {longest} tokens" if cut else "")

    def _ends(self) -> set[int]:
        config = self.model.generation_config
        ends = config.eos_token_id
        return {config.pad_token_id} | set(ends if isinstance(ends, list) else [ends])

    @property
    def _begins(self) -> bool:
        """Whether the text given is the beginning of the caption."""
        return not (self.options.prompt or self._tasks() or self._chats())

    def _tasks(self) -> dict[str, str]:
        tasks: dict[str, str] = getattr(self.processor, "task_prompts_without_inputs", None) or {}
        return tasks

    def _chats(self) -> bool:
        return getattr(self.processor, "chat_template", None) is not None

    def _text(self, wishes: Wishes) -> str | None:
        """Return what the model is given beside the picture. Raises UserError."""
        options, asked = self.options, wishes.instruction
        if options.prompt is not None:
            if asked and "{instruction}" not in options.prompt:
                raise UserError("--instruction has no place in prompt: put {instruction} into it")
            return options.prompt.replace("{instruction}", asked or _question(wishes))
        if tasks := self._tasks():
            return self._task(tasks, asked, wishes)
        if options.task is not None:
            raise UserError(
                f"task={options.task}: model {options.model} has no tasks; leave it out"
            )
        if self._chats():
            content = [{"type": "image"}, {"type": "text", "text": asked or _question(wishes)}]
            with loading(f"model {options.model}: its chat template"):
                text: str = self.processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
            return text
        if getattr(self.processor, "image_token", None):
            raise UserError(
                f"model {options.model} brings no chat template, so how to ask it is unknown: set "
                f"prompt, such as 'prompt=USER: {self.processor.image_token} {{instruction}} "
                "ASSISTANT:'"
            )
        self._cannot_leave_out(wishes)
        return asked or None

    def _task(self, tasks: dict[str, str], asked: str, wishes: Wishes) -> str:
        options = self.options
        if asked:
            raise UserError(
                f"--instruction: model {options.model} knows tasks and no other words; set task to "
                "caption, detailed_caption or more_detailed_caption instead"
            )
        task = f"<{(options.task or 'detailed_caption').upper()}>"
        if task not in tasks:
            raise UserError(f"task={options.task}: model {options.model} does not know this task")
        self._cannot_leave_out(wishes)
        return task

    def _cannot_leave_out(self, wishes: Wishes) -> None:
        if wishes.class_noun:
            self.notes = (
                f"model {self.options.model} cannot be asked to leave out what makes the subject "
                "itself: go through the captions, or take a model that follows instructions",
            )


def _question(wishes: Wishes) -> str:
    if wishes.class_noun:
        return DESCRIBE_AROUND.format(wishes.class_noun)
    return DESCRIBE


def _bare(text: str) -> str:
    """Return the text without the quotes that models like to put around an answer."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        return text[1:-1].strip()
    return text


def _load_processor(source: str, safe: dict[str, Any]) -> Any:
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(source, **safe)
    except ImportError as error:
        # Models that see films as well want torchvision for these, and pictures are all we show.
        if "torchvision" not in str(error).lower():
            raise
        return _without_films(source, safe).from_pretrained(source, **safe)


def _without_films(source: str, safe: dict[str, Any]) -> Any:
    """Return the model's processor class as it would be if there were no films."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    config = transformers.AutoConfig.from_pretrained(source, **safe)
    whole: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])
    parts = [part for part in whole.get_attributes() if "video" not in part]

    class ForPictures(whole):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return parts

    ForPictures.__name__ = whole.__name__  # by which transformers chooses tokenizers
    return ForPictures
