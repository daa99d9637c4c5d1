"""The data and the picture of `japanese_vowels.py`."""

import hashlib
import subprocess
import sys
import zipfile

import matplotlib
import numpy as np

from jax_revseg import reverse_sequence

matplotlib.use("Agg")  # A picture in a file needs no screen.
from matplotlib import pyplot as plt  # noqa: E402

WHEEL, VERSION = "aeon-1.6.0-py3-none-any.whl", "aeon==1.6.0"  # It ships the data.
SHA256 = "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409"
LONGEST = 29


def fetch(folder):
    """The wheel with the data, downloaded once and checked every time."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if not wheel.exists():
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


def draw(path, curves, x, lengths):
    """The curves, and a batch before and after."""
    rows, at = x[:24, :, 0], lengths[:24]
    pictures = {
        "a batch (channel 0)": rows,
        "naive flip": rows[:, ::-1],
        "reverse_sequence": reverse_sequence(rows, at),
    }
    figure, axes = plt.subplots(1, 4, width_ratios=[2, 1, 1, 1], figsize=(13, 4))
    for (name, curve), style in zip(curves.items(), ("-", "-", "-", "--"), strict=True):
        mean, steps = 100 * curve.mean(1), np.arange(1, len(curve) + 1)
        (line,) = axes[0].plot(steps, mean, style, label=name)
        low, high = 100 * curve.min(1), 100 * curve.max(1)
        axes[0].fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axes[0].set(xlabel="step", ylabel="% of test utterances right", ylim=(60, 100))
    axes[0].legend(loc="lower right")
    axes[0].set_title("mean of the seeds, and their range")
    for axis, (name, picture) in zip(axes[1:], pictures.items(), strict=True):
        valid = np.arange(LONGEST) < at[:, None]
        valid = valid[:, ::-1] if name == "naive flip" else valid
        axis.imshow(np.where(valid, picture, np.nan), aspect="auto", cmap="viridis")
        axis.set(title=name, xlabel="step", facecolor="lightgrey")
    axes[1].set_ylabel("utterance (grey: padding)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
