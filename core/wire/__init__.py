"""The wire: what the HTTP API takes and answers, a module a resource, shared by the API and the client."""
