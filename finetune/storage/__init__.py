"""Files on disk: the workspace, whole-file writes, journals, locks, the shared cache and the run folder. Torch-free."""
