"""Reports of runs and studies: self-contained HTML pages and SVG figures."""
