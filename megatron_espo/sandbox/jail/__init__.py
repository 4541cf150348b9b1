"""What runs inside the sandbox: the generated code and its tests, in two jails of their own.

These files need nothing but the standard library, because that is all there is inside.
"""
