"""Make emoji.npz and emoji.json: Noto Emoji's 1,911 pictures at 32x32, from the npm package that carries them.

    npm pack emoji-datasource-google@16.0.0
    python examples/emoji/make_data.py emoji-datasource-google-16.0.0.tgz

The package has a PNG of 64x64 pixels for each emoji and a table of their names and groups. Each picture is laid on
white and halved (every four pixels are one, averaged); its label is the number of its group among Unicode's 99
("face-smiling", "animal-bird", "country-flag"). Skin tones are left out: 1,875 more pictures that differ in colour
alone. emoji.npz holds pictures and labels, as ``sparse-engine finetune --data`` takes them; emoji.json the names of the
groups and of the pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
ARCHIVE, NAMES = "emoji.npz", "emoji.json"
TABLE, PICTURES = "package/emoji.json", "package/img/google/64/"
SIZE = 32


def picture(png: bytes) -> np.ndarray:
    """A PNG with transparency, laid on white: uint8 [32, 32, 3]."""
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn)
    return np.asarray(page.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a file of the archive holds; nothing of a folder."""
    stream = archive.extractfile(member)
    return stream.read() if stream else b""


def read(package: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Read the package, in Unicode's order: images uint8 [1911, 32, 32, 3], labels int64 [1911]; names of both."""
    with tarfile.open(package) as archive:  # read from its beginning to its end: what is compressed has no other way
        kept = (member for member in archive if member.name.startswith((TABLE, PICTURES)))
        found = {member.name: content(archive, member) for member in kept}
    drawn = [entry for entry in json.loads(found[TABLE]) if entry["has_img_google"]]
    drawn.sort(key=lambda entry: entry["sort_order"])
    images = np.stack([picture(found[PICTURES + entry["image"]]) for entry in drawn])
    groups = list(dict.fromkeys(entry["subcategory"] for entry in drawn))
    labels = np.array([groups.index(entry["subcategory"]) for entry in drawn])
    return {"images": images, "labels": labels}, {"groups": groups, "names": [entry["name"].lower() for entry in drawn]}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="emoji-datasource-google's .tgz, as npm pack leaves it")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder (default: this one)")
    given = parser.parse_args()
    arrays, names = read(given.package)
    archive = given.out / ARCHIVE
    np.savez_compressed(archive, **arrays)
    (given.out / NAMES).write_text(json.dumps(names, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    count, groups = len(arrays["images"]), len(names["groups"])
    print(f"{archive}: {count:,} pictures of {groups} groups, {archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
