"""Files on disk: the workspace, atomic writes, journals, locks, the shared cache and the run folder. Torch-free."""
