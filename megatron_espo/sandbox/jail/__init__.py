"""What runs inside the sandbox: generated code, and in another process the judge of its tests.

These files need nothing but the standard library and each other, because that is all there is
inside; there they are a package of their own.
"""
