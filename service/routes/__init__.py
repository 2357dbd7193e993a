"""The HTTP routes, one module per kind of resource. A route translates a request into a call and its result into a response."""
