"""The data of `japanese_vowels.py`."""

import hashlib
import subprocess
import sys
import zipfile

import numpy as np

WHEEL, VERSION = "aeon-1.6.0-py3-none-any.whl", "aeon==1.6.0"  # It ships the data.
SHA256 = "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409"
CHANNELS, SPEAKERS, LONGEST = 12, 9, 29


def fetch(folder):
    """The wheel with the data, downloaded once and checked every time."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if not wheel.exists():
        print(
            f"Downloading {VERSION} from PyPI (6.4 MB, once) into {folder}.\n"
            "This wheel contains the data set JapaneseVowels, 640 utterances.",
            flush=True,
        )
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder)]
        done = subprocess.run([*pip, VERSION], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            sys.exit(
                f"Could not download the data, {VERSION} from PyPI: {why}\n"
                f"Put {WHEEL} into {folder}, or give --data FOLDER, and try again."
            )
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{wheel} is not the file expected (SHA-256); delete it, try again.")
    return wheel


def read(wheel, part):
    """Utterances padded with zeros, (N, T, 12), with their lengths and speakers."""
    name = f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
    text = zipfile.ZipFile(wheel).read(name).decode()
    rows = [row.split(":") for row in text.splitlines() if row[:1] not in ("@", "#")]
    x = [np.array([c.split(",") for c in row[:-1]], np.float32).T for row in rows]
    lengths = np.array([len(row) for row in x])
    padded = np.zeros((len(x), LONGEST, x[0].shape[1]), np.float32)
    for out, row in zip(padded, x, strict=True):
        out[: len(row)] = row
    return padded, lengths, np.array([int(row[-1]) - 1 for row in rows])


def load(folder):
    """The training and the test part, each channel of mean 0 and deviation 1."""
    parts = [read(fetch(folder), part) for part in ("TRAIN", "TEST")]
    valid = [np.arange(LONGEST) < lengths[:, None] for _, lengths, _ in parts]
    known = parts[0][0][valid[0]]
    mean, deviation = known.mean(0), known.std(0)
    return [
        (np.where(at[..., None], (x - mean) / deviation, 0), lengths, speakers)
        for (x, lengths, speakers), at in zip(parts, valid, strict=True)
    ]
