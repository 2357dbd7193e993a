"""A remote folder. (Being written.)"""

from finetune.data.places.tree import Place
from finetune.data.reading import Reading
from finetune.errors import DataError


def open_remote(location: str, reading: Reading) -> Place:
    raise DataError(f"{location}: remote folders are not read yet")
