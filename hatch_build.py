"""What an index shows of this project: its links, and the README without relative ones.

Both depend on the address of the repository, `repository` in pyproject.toml.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# A link or a picture whose target is a path to a file in the repository.
RELATIVE = re.compile(r"(!?)\[([^]]*)\]\((?!https?://)([^)#]+\.\w+[^)]*)\)")
PLACES = {
    "Homepage": "",
    "Documentation": "/tree/main/docs",
    "Changelog": "/blob/main/CHANGELOG.md",
    "Issues": "/issues",
}


def readme(markdown: str, repository: str) -> str:
    """Makes relative links absolute; without an address only their text stays."""

    def link(found: re.Match) -> str:
        is_picture, text, target = found.groups()
        if not repository:
            return "" if is_picture else text
        kind = "raw" if is_picture else "blob"
        return f"{is_picture}[{text}]({repository}/{kind}/main/{target})"

    return RELATIVE.sub(link, markdown)


class MetadataHook(MetadataHookInterface):
    """Hatchling calls `update` when it builds the package."""

    def update(self, metadata: dict) -> None:
        """Fills in the fields that pyproject.toml lists as dynamic."""
        repository = self.config["repository"].rstrip("/")
        markdown = (Path(self.root) / "README.md").read_text()
        text = readme(markdown, repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        places = {name: repository + place for name, place in PLACES.items()}
        metadata["urls"] = places if repository else {}
