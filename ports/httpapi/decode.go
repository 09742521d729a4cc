package httpapi

import (
	"bytes"
	"cmp"
	"errors"
	"net/http"
	"strings"
	"unicode"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const (
	maxBody  = 64 << 10 // bytes
	maxDepth = 16       // of nested JSON
)

// decode reads a JSON object into v, and refuses what could be read in two ways: a member that is unknown or comes
// twice, text that is not UTF-8, something after the object. The error is a Problem with status 400.
func decode(body []byte, v any) error {
	if len(bytes.TrimSpace(body)) == 0 {
		return newProblem(http.StatusBadRequest, "body_empty", "the body must be a JSON object; it is empty")
	}
	if err := checkDepth(body); err != nil {
		return err
	}
	if first := bytes.TrimLeft(body, " \t\r\n"); first[0] != '{' {
		return newProblem(http.StatusBadRequest, "body_not_an_object", "the body must be a JSON object")
	}
	err := json.Unmarshal(body, v, json.RejectUnknownMembers(true))
	if err == nil {
		return nil
	}
	if syntax, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		if errors.Is(err, jsontext.ErrDuplicateName) {
			return fieldProblem(syntax.JSONPointer, "member_twice", "comes twice")
		}
		return malformed()
	}
	if semantic, ok := errors.AsType[*json.SemanticError](err); ok {
		if errors.Is(err, json.ErrUnknownName) {
			return fieldProblem(semantic.JSONPointer, "member_unknown", "is not known here")
		}
		return fieldProblem(semantic.JSONPointer, "member_wrong_type", "has the wrong type or is out of range: "+wanted(semantic))
	}
	return malformed()
}

// checkDepth walks the tokens, so that deep nesting ends here and not in a recursion.
func checkDepth(body []byte) error {
	tokens := jsontext.NewDecoder(bytes.NewReader(body))
	var err error
	for ; err == nil; _, err = tokens.ReadToken() {
		if tokens.StackDepth() > maxDepth {
			return newProblem(http.StatusBadRequest, "body_too_deep", "the body is nested more than 16 levels deep")
		}
	}
	return nil // at the end, or at a fault that the decoder describes better
}

func wanted(err *json.SemanticError) string {
	if err.GoType == nil {
		return "see /docs"
	}
	switch kind := strings.TrimPrefix(err.GoType.String(), "*"); kind {
	case "string":
		return "it must be a string"
	case "bool":
		return "it must be true or false"
	case "int", "int64":
		return "it must be a whole number without fraction or exponent"
	default:
		return "see /docs"
	}
}

func fieldProblem(pointer jsontext.Pointer, code, says string) *Problem {
	field := named(strings.TrimPrefix(string(pointer), "/"))
	p := newProblem(http.StatusBadRequest, code, field+" "+says)
	p.Errors = []FieldProblem{{field, code, p.Detail}}
	return p
}

// named is the name of an input as a problem repeats it: short, and with nothing that could do harm where it is shown.
func named(input string) string {
	input = strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("_-./~ ", r) {
			return r
		}
		return '?'
	}, input)
	return cmp.Or(strings.ToValidUTF8(clip(input, 64), ""), `""`)
}

func malformed() *Problem {
	return newProblem(http.StatusBadRequest, "body_malformed", "the body is not one complete JSON object in UTF-8")
}
