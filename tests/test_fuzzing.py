"""Damaged files by the thousand: each is read right or refused with this package's own error; nothing else happens.

The normal run takes a few files of each reader, `-m slow` all of them. `python tests/test_fuzzing.py` prints the table
of the README.
"""

from __future__ import annotations

import sys

import pytest
from fuzz_data_readers import DATA_READERS
from fuzz_harness import Reader, fuzz, summary
from fuzz_readers import READERS as FILE_READERS

READERS = (*FILE_READERS, *DATA_READERS)

FULL, SHORT, SEED = 900, 12, 20260101
"""Files of each reader."""


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_few_damaged_files(reader: Reader) -> None:
    outcome = fuzz(reader, SHORT, SEED)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.files == SHORT


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_many_damaged_files(reader: Reader) -> None:
    outcome = fuzz(reader, FULL, SEED)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.files == FULL


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else FULL
    chosen = [reader for reader in READERS if not sys.argv[2:] or any(name in reader.name for name in sys.argv[2:])]
    outcomes = {}
    for one in chosen:
        outcomes[one.name] = fuzz(one, count, SEED)
        print("\n".join([one.name, *outcomes[one.name].failures]), flush=True)
    print(summary(outcomes))
