"""From an example, and solved examples before it, to the text that a model is given and the text it should write."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from infra.errors import InvalidInput
from training.data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_PROBE = "REGRAFT-PROBE"


@dataclass(frozen=True)
class PromptFormat:
    r"""How a tokenizer's model is asked.

    Where the tokenizer has a chat template, shots are earlier turns of the conversation and the instruction is the
    system message (or opens the first user turn, where the template knows no system message). Elsewhere the text is

        instruction            (if any)

        Q: prompt of a shot
        A: completion of a shot

        Q: prompt
        A:

    Both texts hold every special token that the model should see, so encode them with `add_special_tokens=False`,
    each on its own: the prompt's ids are then exactly what generation starts from, and no token straddles the border
    where the loss begins. The border is chosen so that common tokenizers also cut there when given the whole text.

    Args:
        tokenizer: the base model's.
        instruction: what to do and how to answer; `DataSource.instruction_text` is a recipe's, and the adapter that
            was trained with it is served and judged with it.
    """

    tokenizer: "PreTrainedTokenizerBase"
    instruction: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def end_mark(self) -> str:
        """The special token that ends an answer: the chat template's end of turn, or the end of text.

        Raises:
            InvalidInput: the tokenizer has neither.
        """
        mark = self.tokenizer.eos_token or ""
        if self.is_chat:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
            rendered = self._render(turns, add_generation_prompt=False)
            # What a template puts after the mark (a newline, mostly) is never generated: generation has stopped.
            mark = rendered.rpartition(_PROBE)[2].strip() or mark
        if not mark:
            raise InvalidInput(
                "The tokenizer has no token that ends a text, so a model cannot learn where to stop.",
                "Set eos_token in the base model's tokenizer_config.json.",
            )
        return mark

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Text at which an answer is over although the end mark has not come.

        A plain model that was never trained on the format goes on to write the next question.
        """
        return () if self.is_chat else ("\nQ:",)

    def prompt(self, question: str, shots: Sequence[Example] = ()) -> str:
        """The text that generation starts from.

        Args:
            question: an example's prompt.
            shots: solved examples, first to last.
        """
        return self._chat_prompt(question, shots) if self.is_chat else self._plain_prompt(question, shots)

    def completion(self, answer: str) -> str:
        """The text that should follow the prompt, end mark included."""
        return f"{'' if self.is_chat else ' '}{answer}{self.end_mark}"

    def training_text(self, example: Example, shots: Sequence[Example] = ()) -> tuple[str, str]:
        """Prompt and completion of an example."""
        return self.prompt(example.prompt, shots), self.completion(example.completion)

    def plain_text(self, text: str) -> str:
        """A text that is no answer to anything, as in pretraining: from the start mark to the end of text."""
        return f"{self._start_mark}{text}{self.tokenizer.eos_token or ''}"

    def _chat_prompt(self, question: str, shots: Sequence[Example]) -> str:
        turns: list[Message] = []
        for shot in shots:
            turns += [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.completion}]
        turns.append({"role": "user", "content": question})
        if self.instruction and self._has_system_message:
            turns.insert(0, {"role": "system", "content": self.instruction})
        elif self.instruction:
            turns[0] = {"role": "user", "content": f"{self.instruction}\n\n{turns[0]['content']}"}
        return self._render(turns, add_generation_prompt=True)

    def _plain_prompt(self, question: str, shots: Sequence[Example]) -> str:
        blocks = [self.instruction] if self.instruction else []
        blocks += [f"Q: {shot.prompt}\nA: {shot.completion}" for shot in shots]
        blocks.append(f"Q: {question}\nA:")
        return self._start_mark + "\n\n".join(blocks)

    @cached_property
    def _start_mark(self) -> str:
        """The beginning-of-text token, where the tokenizer puts one in front by itself."""
        start = self.tokenizer.bos_token_id
        if start is None or self.tokenizer("Q")["input_ids"][0] != start:
            return ""
        return str(self.tokenizer.bos_token)

    @cached_property
    def _has_system_message(self) -> bool:
        """Whether the template shows a system message to the model; some refuse it, some drop it."""
        from jinja2 import TemplateError

        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
        try:
            return _PROBE in self._render(turns, add_generation_prompt=True)
        except TemplateError:
            return False

    def _render(self, turns: Sequence[Message], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
