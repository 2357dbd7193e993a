"""Pages and pictures of what runs did: self-contained HTML, SVG figures."""
