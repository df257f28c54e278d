from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    question: str
    answer: str
    level: int | None = None
    source: str = ""
