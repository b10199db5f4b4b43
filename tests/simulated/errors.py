"""The exceptions of CuPy that are not Python's own."""


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime.CUDARuntimeError."""


class CUDADriverError(RuntimeError):
    """As cupy.cuda.driver.CUDADriverError."""


class CompileException(Exception):
    """As cupy.cuda.compiler.CompileException: what the compiler said."""

    def __init__(self, message: str, source: str, name: str, options: tuple[str, ...]) -> None:
        super().__init__(message)
        self.source, self.name, self.options = source, name, options

    def get_message(self) -> str:
        return str(self.args[0])
