"""Write arithmetic_questions.jsonl: the first 40 held-out questions of the generated task.

python data/generate.py [FILE]        (`make data` runs it, and samples labelled.jsonl)
"""

import sys
from dataclasses import asdict
from pathlib import Path

from sbtiny.runs import write_jsonl
from sbtiny.tasks.arithmetic import generate_questions

KEYS = ("id", "question", "answer", "level")


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("arithmetic_questions.jsonl")
    rows = map(asdict, generate_questions("test", limit=40))
    write_jsonl(file, [{key: row[key] for key in KEYS} for row in rows])


if __name__ == "__main__":
    main()
