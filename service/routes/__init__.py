"""The HTTP routes, a module for each kind of resource. A route translates a request to one call and the result to one answer."""
