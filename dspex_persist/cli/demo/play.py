"""The order of the demo's scenes."""

from contextlib import ExitStack

from dspex_persist.cli.demo import interrupted, scenes
from dspex_persist.cli.demo.stage import SESSION, DemoContext


def play(stage: DemoContext) -> None:
    from dspex_persist import connect

    stage.say("Starting the server as a separate process, on a new database file.")
    with ExitStack() as stack:
        server = stack.enter_context(stage.start_server())
        stage.add(f"It is process {server.pid} and listens on 127.0.0.1:{server.port}.")
        url = f"grpc://127.0.0.1:{server.port}"
        client = stack.enter_context(connect(url, timeout_s=scenes.CALL_TIMEOUT_S))
        scenes.register(stage, client)
        watching = stack.enter_context(connect(url))
        observer = stack.enter_context(scenes.Observer(watching.watch(SESSION)))
        scenes.change(stage, client)
        scenes.show_updates(stage, observer)
        scenes.show_history(stage, client)
        mover = interrupted.begin(stage, stack.enter_context(connect(url)), observer)
        writers = scenes.write_until_killed(stage, client, server, observer)
        mover.join()
    with ExitStack() as stack:
        stage.say("Restarting it on the same file.")
        server = stack.enter_context(stage.start_server())
        stage.add(f"It is process {server.pid} now.")
        client = stack.enter_context(connect(f"grpc://127.0.0.1:{server.port}"))
        scenes.show_writes(stage, client, writers)
        scenes.show_resumed_watch(stage, client, observer)
        interrupted.show(stage, client)
        scenes.show_verification(stage)
        scenes.stop(stage, server)
