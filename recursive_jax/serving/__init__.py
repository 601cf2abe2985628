"""An HTTP server with OpenAI's API over one depth-wise engine.

`schema` has the bodies of requests, `asked` turns them into requests of the engine, `engine_thread`
runs the engine, `replies` makes answers of its events, and `app` has the routes.
"""
