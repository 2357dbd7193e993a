"""Open the places of data, one module for each kind: a folder, an archive, uploaded contents, a remote folder. Torch-free.

A place is opened as a `Tree` of folders and files. `finetune.data.sources` interprets the files, so any format works in any
place.
"""

from __future__ import annotations

from finetune.data.places.local_folder import image_files
from finetune.data.places.opening import open_place
from finetune.data.places.tree import Folder, Node, Place, Tree

__all__ = ["Folder", "Node", "Place", "Tree", "image_files", "open_place"]
