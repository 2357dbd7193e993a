"""Places that data lies in, one module for each: a folder, an archive, an uploaded store, a remote folder. Torch-free.

A place is opened as a `Tree`: folders and files with names, whatever holds them. What the files mean is for
`finetune.data.sources`, so any format works in any place.
"""

from __future__ import annotations

from finetune.data.places.local_folder import image_files
from finetune.data.places.opening import open_place
from finetune.data.places.tree import Folder, Node, Place, Tree

__all__ = ["Folder", "Node", "Place", "Tree", "image_files", "open_place"]
