"""Examine labelled images before training: what is wrong with them, the evidence, and what to do about it.

Each kind of examination is a module that returns findings about a dataset. `examine` runs all of them; the findings are written
as JSON, as a page with pictures, and as a corrected manifest. Files of the user are never changed.
"""
