"""One row of a data set: values by option, checked for their types, and the sample that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sample import Sample

_VQA_ANSWERS = 10


@dataclass(frozen=True)
class Row:
    """The values of one row.

    Attributes:
        sample_id: The id of its sample.
        place: Where it stands, for messages.
        columns: Option → column (or key) of its value, as far as the option is given.
        values: Column → value.
        label: The row's class; empty where there is none.
    """

    sample_id: str
    place: str
    columns: Mapping[str, str]
    values: Mapping[str, Any]
    label: str

    @classmethod
    def of(
        cls,
        default_id: str,
        place: str,
        columns: Mapping[str, str],
        values: Mapping[str, Any],
        classes: list[str] | None = None,
    ) -> Row:
        """Read the id and the label.

        Args:
            default_id: The id, unless a column has it.
            place: Where the row stands.
            columns: Option → column.
            values: Column → value.
            classes: Names of the classes, where labels are numbers.

        Raises:
            ValueError: An id or a label is neither a text nor a number.
        """
        row = cls(default_id, place, columns, values, "")
        number = row.value("label")
        if classes is not None and isinstance(number, int):
            label = classes[number] if number >= 0 else ""
        else:
            label = row._name("label")
        return cls(row._name("sample_id") or default_id, place, columns, values, label)

    def sample(self, image: Path, prompt: str) -> Sample:
        """The sample of the row.

        Args:
            image: Its picture.
            prompt: What is asked, or what follows the row's question.

        Raises:
            ValueError: A value has another type than its option needs.
        """
        references = tuple(" ".join(text.split()) for text in self._texts("references"))
        answers = self._texts("answers")
        return Sample(
            sample_id=self.sample_id,
            image=image,
            prompt=self._text("question") + prompt,
            target=self._text("target") or next(iter(references), "") or max(answers, key=answers.count, default=""),
            references=references,
            answers=answers * _VQA_ANSWERS if len(answers) == 1 else answers,
            answer_type=self._text("answer_type"),
            question_type=self._text("question_type"),
            label=self.label,
        )

    def value(self, option: str) -> Any:
        """The value that an option names; none where the option is not given, or the row has none."""
        return self.values.get(self.columns[option]) if option in self.columns else None

    def odd(self, option: str, expected: str) -> ValueError:
        """The error for a value of another type."""
        return ValueError(
            f"{self.place}: expected {expected} in {self.columns[option]!r} for --data.init_args.{option}, got "
            f"{type(self.value(option)).__name__}"
        )

    def _text(self, option: str) -> str:
        match self.value(option):
            case None:
                return ""
            case str(text):
                return text
        raise self.odd(option, "a text")

    def _name(self, option: str) -> str:
        match self.value(option):
            case None:
                return ""
            case str() | int() as value:
                return str(value)
        raise self.odd(option, "texts or numbers")

    def _texts(self, option: str) -> tuple[str, ...]:
        match self.value(option):
            case None:
                return ()
            case str(text):
                return (text,)
            case list(given):
                found = [each["answer"] if isinstance(each, dict) and "answer" in each else each for each in given]
                if all(isinstance(text, str) for text in found):
                    return tuple(found)
        raise self.odd(option, "a text or a list of texts")
