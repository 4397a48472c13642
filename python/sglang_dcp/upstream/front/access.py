"""Who may read what is an administrator's call. SGLang checks keys in front of its application, but not in tokenizer workers."""

from __future__ import annotations

from fastapi import HTTPException, Request


def check_key(request: Request) -> None:
    """A dependency of such a route. Raises HTTPException unless the request has the key: --admin-api-key's, else --api-key's."""
    from sglang.srt.runtime_context import get_serving
    from sglang.srt.utils.auth import AuthLevel, decide_request_auth

    serving = get_serving()
    decision = decide_request_auth(
        method=request.method,
        path=request.url.path,
        authorization_header=request.headers.get("Authorization"),
        api_key=serving.api_key,
        admin_api_key=serving.admin_api_key,
        auth_level=AuthLevel.ADMIN_OPTIONAL,
    )
    if not decision.allowed:
        raise HTTPException(status_code=decision.error_status_code, detail="an administrator's call: it needs --admin-api-key's key")
