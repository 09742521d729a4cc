package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"

	"takeout/ports/httpapi"
)

// client is a part of each command that talks to a running takeout, over its HTTP API as every other client does.
type client struct {
	formatFlag
	URL string `name:"url" env:"TAKEOUT_URL" default:"http://127.0.0.1:8080" help:"Where takeout serves HTTP."`

	operator string // who acts, empty if nobody needs to know
}

// errUnknown is an error after which the same request may be sent again under the same key.
type errUnknown struct{ error }

func retryable(err error) bool {
	_, ok := errors.AsType[errUnknown](err)
	return ok
}

// call sends a request and decodes the answer. What the server says is wrong becomes the error.
func (c *client) call(ctx context.Context, method, path string, body any, key string, answer any) error {
	var payload io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		payload = bytes.NewReader(encoded)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	server, err := url.Parse(c.URL)
	if err != nil || server.Scheme != "http" && server.Scheme != "https" || server.Host == "" {
		return usage(fmt.Errorf("--url (TAKEOUT_URL): must be such as http://127.0.0.1:8080"))
	}
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.URL, "/")+path, payload)
	if err != nil {
		return err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if strings.ContainsFunc(key+c.operator, unicode.IsControl) {
		return usage(errors.New("--idempotency-key and --operator: must be one line of text")) // or it would not even be sent
	}
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
	}
	if c.operator != "" {
		request.Header.Set("X-Operator", c.operator)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return errUnknown{fmt.Errorf("no takeout answers at %s: %w; is takeout serve running there? (--url)", server.Redacted(), errors.Unwrap(err))}
	}
	defer response.Body.Close()
	if response.StatusCode >= http.StatusBadRequest {
		var problem httpapi.Problem
		if err := json.NewDecoder(response.Body).Decode(&problem); err != nil || problem.Detail == "" {
			problem.Detail = fmt.Sprintf("%s answers %s; is takeout serve running there? (--url)", server.Redacted(), response.Status)
		}
		err := fmt.Errorf("%s", problem.Detail)
		for _, field := range problem.Errors {
			if field.Detail != problem.Detail {
				err = fmt.Errorf("%w; %s: %s", err, field.Field, field.Detail)
			}
		}
		if response.StatusCode >= http.StatusInternalServerError {
			return errUnknown{err}
		}
		return err
	}
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		return fmt.Errorf("what answers at %s does not speak takeout's JSON: %w; is takeout serve running there? (--url)", server.Redacted(), err)
	}
	return nil
}
