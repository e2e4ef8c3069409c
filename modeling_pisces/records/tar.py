"""Tar files as bytes: the same members give the same bytes, on any machine and day."""

import io
import tarfile
from collections.abc import Iterable


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A WebDataset shard of (name, content) pairs, in their order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()
