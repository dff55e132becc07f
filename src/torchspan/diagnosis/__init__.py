"""Why a compile is slow, breaks or fails: profile, explanation, reproduction."""
