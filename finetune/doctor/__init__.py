"""The examination of labelled images before training: what is wrong with them, with evidence, and what to do about it.

Each kind of examination is a module that turns a dataset, and what is known of its images, into findings. `examine` runs all of
them; the findings become JSON, a page with pictures, and a corrected manifest. No file of the user is ever touched.
"""
